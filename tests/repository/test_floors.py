"""A module imports only from floors below its own, or from its own package.

Imports under ``TYPE_CHECKING`` count: what a type names, a reader must know.
"""

import ast

import pytest
from places import ROOT

SRC = ROOT / "src" / "kedit_lightning"
# Parts of one floor do not import each other. `errors` lies under `requests`, which raises them.
FLOORS = [
    ["errors"],
    ["requests", "registry", "cache_folder"],
    ["edits", "data", "metrics"],
    ["base_models"],
    ["statistics", "benchmark"],
    ["runs", "methods"],
    ["analysis"],
    ["callbacks"],
    ["trainer"],
    ["cli"],
    ["__main__"],
]
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
FLOOR["configs"] = 0  # YAML only


def modules():
    """Yield each module: its parts below ``kedit_lightning``, whether it is a package, its file."""
    for place, prefix in ((SRC, ()), (ROOT / "callbacks", ("callbacks",))):
        for path in sorted(place.rglob("*.py")):
            parts = (*prefix, *path.relative_to(place).with_suffix("").parts)
            if parts == ("__init__",):
                continue  # hands out names of every floor, lazily
            is_package = parts[-1] == "__init__"
            yield (parts[:-1] if is_package else parts), is_package, path


def imported(parts, is_package, tree):
    """Yield the first part, below ``kedit_lightning``, of whatever a module imports from there."""
    package = parts if is_package else parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                above = package[: len(package) - (node.level - 1)]
                module = ["kedit_lightning", *above, *module]
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "kedit_lightning":
                # the root itself re-exports every floor, so nothing below may lean on it
                yield name[1] if len(name) > 1 else "kedit_lightning"


@pytest.mark.parametrize(
    ("parts", "is_package", "path"),
    [pytest.param(*module, id=".".join(module[0])) for module in modules()],
)
def test_imports_point_down(parts, is_package, path):
    own = parts[0]
    assert own in FLOOR, f"{own} has no floor yet; name one in tests/test_floors.py"
    tree = ast.parse(path.read_text())
    for other in imported(parts, is_package, tree):
        if other in {own, "__version__"}:
            continue
        assert other in FLOOR, (
            f"{path.relative_to(ROOT)} imports kedit_lightning.{other}, which has no floor"
        )
        assert FLOOR[other] < FLOOR[own], (
            f"{path.relative_to(ROOT)} (floor of {own}) imports {other}, which is not below it"
        )


@pytest.mark.parametrize(
    ("line", "parts", "is_package", "expected"),
    [
        ("from ..edits import Edit", ("base_models", "base"), False, {"edits"}),
        ("from ..edits import Edit", ("methods", "locate"), True, {"methods"}),
        ("from ...edits import Edit", ("methods", "locate"), True, {"edits"}),
        ("from . import cli", ("trainer",), False, {"cli"}),
        ("from kedit_lightning import BaseModel", ("edits",), True, {"BaseModel"}),
        ("import kedit_lightning.trainer", ("edits",), True, {"trainer"}),
        ("import torch", ("edits",), True, set()),
    ],
)
def test_imports_are_resolved(line, parts, is_package, expected):
    assert set(imported(parts, is_package, ast.parse(line))) == expected
