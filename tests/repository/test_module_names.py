"""Rule 6: a module name occurs once and is a noun; files and the package stay short."""

from __future__ import annotations

from collections import Counter

import pytest
from source_tree import check, modules, planted

MAX_LINES = 350
#: Words that name an activity where a noun of the field exists.
GERUNDS = frozenset(
    {
        "asking",
        "carrying",
        "choosing",
        "doing",
        "finding",
        "giving",
        "holding",
        "keeping",
        "looking",
        "making",
        "meeting",
        "proposing",
        "reading",
        "running",
        "saying",
        "stepping",
        "taking",
        "telling",
        "trying",
        "writing",
    }
)


def repeated(tree):
    """Names of several modules."""
    names = Counter(module.parts[-1] for module in tree if not module.is_package)
    yield from sorted(name for name, count in names.items() if count > 1 and name != "__main__")


def gerunds(tree):
    """Modules and packages that are named by what is done in them."""
    for module in tree:
        if GERUNDS & set(module.parts[-1].split("_")):
            yield module.name


def long(tree):
    """Modules of too many lines."""
    for module in tree:
        if (lines := module.source.count("\n")) > MAX_LINES:
            yield f"{module.name} has {lines} lines: has it more than one reason to exist?"


@pytest.mark.parametrize("rule", [repeated, gerunds, long])
def test_the_package_keeps(rule):
    check(rule(modules()))


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (repeated, {"edits__cache": "", "statistics__cache": ""}),
        (repeated, {"edits__cache": "", "callbacks__cache": ""}),
        (gerunds, {"methods__shared__reading": ""}),
        (gerunds, {"methods__proposing_edits__": ""}),
        (long, {"edits__stack": "\n" * (MAX_LINES + 1)}),
    ],
)
def test_a_violation_is_reported(rule, sources):
    assert list(rule(planted(**sources)))


def test_what_is_allowed_is_not_reported():
    tree = planted(edits__cache__="", statistics__cache="\n" * MAX_LINES, methods__training="")
    assert [*repeated(tree), *gerunds(tree), *long(tree)] == []
