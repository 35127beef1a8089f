"""Rule 3: a method lives in its room; at most four levels of inheritance."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
from source_tree import check, modules, planted

from kedit_lightning.edits import Edit
from kedit_lightning.methods import EditMethod

LEVELS = 4
#: What every method sees, and what each of these sees.
BASE = (("methods", "method"), ("methods", "capabilities"))
COMMON = (*BASE, ("methods", "shared"), ("methods", "training"))
SEEN_BY = {
    "method": (*BASE, ("methods", "shared")),
    "capabilities": (),
    "shared": (("methods", "shared"),),
    "training": COMMON,
}


def seen(parts, is_package=False):
    """The rooms below ``methods/`` that a module there may import from."""
    if len(parts) == 1:
        return (("methods",),)  # its ``__init__`` hands out all methods
    if parts[1] in SEEN_BY:
        return SEEN_BY[parts[1]]
    family = parts[:2]
    if len(parts) == 2:
        return (family,)
    return (parts[:3], (*family, "shared"), *COMMON)


def outside(tree):
    """Imports of methods from rooms that are not theirs."""
    for module in tree:
        if module.parts[0] != "methods":
            continue
        rooms = seen(module.parts)
        for imported in module.imports:
            parts = imported.below
            if parts and parts[0] == "methods" and not any(parts[: len(r)] == r for r in rooms):
                yield f"{module.name}:{imported.line} imports {'.'.join(parts)}"


def level(kind):
    """How many classes of this package a class has above it, itself included."""
    if kind in (Edit, EditMethod):
        return 1
    own = [b for b in kind.__bases__ if b.__module__.startswith("kedit_lightning") or _planted(b)]
    return 1 + max(map(level, own), default=0)


def _planted(kind):
    return kind.__module__ == __name__


def too_deep(classes):
    """Classes with more than so many levels."""
    for kind in classes:
        if level(kind) > LEVELS:
            yield f"{kind.__module__}.{kind.__name__} has {level(kind)} levels"


def all_classes():
    for module in modules():
        if module.parts[-1] == "__main__":
            continue
        loaded = import_module(f"kedit_lightning.{module.name}")
        for _, kind in inspect.getmembers(loaded, inspect.isclass):
            if kind.__module__ == loaded.__name__:
                yield kind


def test_methods_stay_in_their_rooms():
    check(outside(modules()))


def test_no_class_has_more_than_four_levels():
    check(too_deep(all_classes()))


@pytest.mark.parametrize(
    "sources",
    [
        {"methods__locate__rome": "from kedit_lightning.methods.locate.memit import MEMIT"},
        {"methods__locate__rome": "from ..hypernetwork.shared import attach"},
        {"methods__locate__rome": "from kedit_lightning.methods import MEMIT"},
        {"methods__hypernetwork__ke__gates": "from ..mend.mend import MEND"},
        {"methods__locate__shared__solve": "from kedit_lightning.methods.locate.rome import ROME"},
        {"methods__training__learned": "from kedit_lightning.methods.finetune import ftm"},
        {"methods__shared__losses": "from kedit_lightning.methods.training import episodes"},
        {"methods__method": "from kedit_lightning.methods.training import episodes"},
    ],
)
def test_a_violation_is_reported(sources):
    assert list(outside(planted(**sources)))


@pytest.mark.parametrize(
    "sources",
    [
        {"methods__": "from kedit_lightning.methods.locate.rome import ROME"},
        {"methods__locate__": "from .rome import ROME"},
        {"methods__locate__rome": "from .shared.solve import solve\nfrom ..method import X"},
        {"methods__hypernetwork__ke__ke": "from .gates import Gates\nfrom ...training import a"},
        {"methods__hypernetwork__ke__": "from .ke import KE"},
        {"runs__a": "from kedit_lightning.methods.locate.rome import ROME"},
    ],
)
def test_what_is_allowed_is_not_reported(sources):
    assert list(outside(planted(**sources))) == []


def test_a_fifth_level_is_reported():
    class Second(EditMethod): ...

    class Third(Second): ...

    class Fourth(Third): ...

    class Mixed(Third): ...

    class Fifth(Mixed, Fourth): ...

    assert list(too_deep([Second, Third, Fourth])) == []
    assert len(list(too_deep([Fifth]))) == 1
