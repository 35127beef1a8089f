"""Habits of the repository that no other tool checks."""

import ast
import re
import subprocess

import pytest
from places import ROOT

MAX_FUNCTION_LINES = 80
# Folders of one machine or one person; a path below them is of no use to anybody else.
MACHINE_PATH = re.compile(r"(?<![\w.~}/-])/(?:home|root|tmp|work|mnt|Users)/[\w.-]+")


def tracked_files():
    """Files git knows; everything below the root where there is no git (an unpacked sdist)."""
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode == 0:
        names = [name for name in listing.stdout.split("\0") if name]
        return [path for name in names if (path := ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file()]


SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_stay_readable(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_no_path_of_one_machine():
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)
        ]
    assert found == []


def test_every_method_stands_in_the_readme():
    rows = [
        re.sub(r"[^a-z0-9|]", "", line.lower())
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("|")
    ]
    missing = [
        path.name
        for path in sorted((ROOT / "configs" / "methods").glob("*.yaml"))
        if not any(path.stem.replace("_", "") in row for row in rows)
    ]
    assert missing == []


def test_changelog_has_a_place_for_the_next_change():
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_ci_runs_what_the_readme_promises():
    steps = re.findall(r"^step \S+ make (\S+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert steps == ["lint", "types", "docs", "test", "demo", "test-slow"]
