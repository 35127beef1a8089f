"""Rule 1: a module imports only from lower floors or its own package, at its top, in no circle.

Imports under ``TYPE_CHECKING`` count: what a type names, a reader must know.
"""

from __future__ import annotations

import pytest
from source_tree import OPTIONAL, Module, check, circles, graph, modules, planted

# Parts of one floor do not import each other. `errors` lies under all that raise them,
# and `chat_turns`, `image_reference` and `probe_task` under `requests`, which have them.
FLOORS = [
    ["errors", "character_forms"],
    ["chat_turns", "image_reference", "probe_task"],
    [
        "requests",
        "registry",
        "task_registry",
        "cache_folder",
        "run_seed",
        "sentence",
        "decoding_settings",
        "notices",
    ],
    ["contradictions"],
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
#: Parts that may import late, for the time that the command takes to start.
LATE = {"cli", "__main__"}


def upward(tree):
    """Imports that do not point down."""
    for module in tree:
        own = module.parts[0]
        if own not in FLOOR:
            yield f"{own} has no floor yet; name one in tests/repository/test_floors.py"
            continue
        for imported in module.imports:
            if imported.below is None:
                continue
            # The root itself re-exports every floor, so nothing below may lean on it.
            other = imported.below[0] if imported.below else "kedit_lightning"
            if other in {own, "__version__"}:
                continue
            if FLOOR.get(other, len(FLOORS)) >= FLOOR[own]:
                yield f"{module.name}:{imported.line} imports {other}, which is not below {own}"


def late(tree):
    """Imports inside functions."""
    for module in tree:
        if module.parts[0] in LATE:
            continue
        for imported in module.imports:
            if imported.in_function and imported.name[0] not in OPTIONAL:
                yield f"{module.name}:{imported.line} imports {'.'.join(imported.name)} late"


def in_circles(tree):
    """Modules that import each other, directly or by way of others."""
    for circle in circles(graph(tree)):
        yield " <-> ".join(circle)


each_module = pytest.mark.parametrize("module", modules(), ids=lambda module: module.name)


@each_module
def test_imports_point_down(module):
    check(upward([module]))


@each_module
def test_imports_stand_at_the_top(module):
    check(late([module]))


def test_no_modules_import_each_other():
    check(in_circles(modules()))


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (upward, {"edits__stack": "from kedit_lightning.methods import ROME"}),
        (upward, {"edits__stack": "from kedit_lightning.data import ZsRE"}),
        (upward, {"edits__stack": "from .. import trainer"}),
        (upward, {"methods__rome": "from kedit_lightning import BaseModel"}),
        (upward, {"base_models__a": "if TYPE_CHECKING:\n    import kedit_lightning.trainer"}),
        (upward, {"attic__a": "import torch"}),
        (late, {"methods__rome": "def f():\n    import torch"}),
        (late, {"callbacks__a": "def f():\n    if x:\n        from wandb import Table"}),
        (late, {"edits__a": "class A:\n    def f(self):\n        from . import b"}),
        (in_circles, {"edits__a": "from . import b", "edits__b": "from .a import A"}),
        (
            in_circles,
            {
                "edits__": "from kedit_lightning.edits.a import A",
                "edits__a": "from kedit_lightning.edits.b import B",
                "edits__b": "from kedit_lightning.edits import A",
            },
        ),
    ],
)
def test_a_violation_is_reported(rule, sources):
    assert list(rule(planted(**sources)))


@pytest.mark.parametrize(
    "sources",
    [
        {"edits__a": "import torch\nfrom kedit_lightning.errors import KEditError"},
        {"methods__": "from ..edits import Edit\nfrom .method import EditMethod"},
        {"cli__main": "def main():\n    from kedit_lightning.trainer import EditTrainer"},
        {"methods__a": "def f():\n    import sentence_transformers"},
        {"edits__": "from .a import A", "edits__a": "from .b import B", "edits__b": ""},
    ],
)
def test_what_is_allowed_is_not_reported(sources):
    tree = planted(**sources)
    assert [*upward(tree), *late(tree), *in_circles(tree)] == []


@pytest.mark.parametrize(
    ("line", "parts", "is_package", "expected"),
    [
        ("from ..edits import Edit", ("base_models", "base"), False, {("edits", "Edit")}),
        ("from ..edits import Edit", ("methods", "locate"), True, {("methods", "edits", "Edit")}),
        ("from ...edits import Edit", ("methods", "locate"), True, {("edits", "Edit")}),
        ("from . import cli", ("trainer",), False, {("cli",)}),
        ("from kedit_lightning import BaseModel", ("edits",), True, {("BaseModel",)}),
        ("import kedit_lightning.trainer", ("edits",), True, {("trainer",)}),
        ("import torch", ("edits",), True, {None}),
    ],
)
def test_imports_are_resolved(line, parts, is_package, expected):
    module = Module(parts, line, is_package)
    assert {imported.below for imported in module.imports} == expected
