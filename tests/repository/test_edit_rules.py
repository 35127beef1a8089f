"""Rule 2: an edit states its effects; the stack applies effects and knows no kind of edit."""

from __future__ import annotations

import ast

import pytest
from source_tree import check, modules, planted

KINDS = ("edits", "kinds")
#: What applies effects.
BLIND = {"edits.effects", "edits.forward_hooks", "edits.row_context", "edits.stack"}


def kinds_known(tree):
    """Imports of kinds by the stack and what it is made of."""
    for module in tree:
        if module.name not in BLIND:
            continue
        for imported in module.imports:
            if imported.below is not None and imported.below[:2] == KINDS:
                yield f"{module.name}:{imported.line} imports {'.'.join(imported.below)}"


def kinds_of(tree):
    """Classes of edits below ``edits/kinds/``, and the room of each: its folder, or its module."""
    rooms, bases = {}, {}
    for module in tree:
        if module.parts[0] != "edits":
            continue
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef):
                if module.parts[:2] == KINDS:
                    rooms[node.name] = module.parts[:3]
                bases[node.name] = {_last(base) for base in node.bases}
    edits = {"Edit"}
    while grown := {name for name, above in bases.items() if above & edits} - edits:
        edits |= grown
    return {name: rooms[name] for name in edits & rooms.keys()}


def _last(node):
    """The last part of the name of a class."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _classes(node):
    """The names of all classes that the second argument of ``isinstance`` lists."""
    return {_last(part) for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)}


def kinds_asked_for(tree):
    """Tests of an edit's class outside the room of that class."""
    rooms = kinds_of(tree)
    for module in tree:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and _last(node.func) in {"isinstance", "issubclass"}:
                asked = _classes(node.args[1])
            elif isinstance(node, ast.MatchClass):
                asked = {_last(node.cls)}
            else:
                continue
            for name in sorted(asked & rooms.keys()):
                if module.parts[: len(rooms[name])] != rooms[name]:
                    yield f"{module.name} asks whether an edit is a {name}"


@pytest.mark.parametrize("rule", [kinds_known, kinds_asked_for])
def test_the_package_keeps(rule):
    check(rule(modules()))


def test_all_kinds_are_seen():
    found = kinds_of(modules())
    assert {"LowRankEdit", "DenseEdit", "CodebookEdit", "PromptEdit", "ScopeEdit"} <= set(found)
    assert found["ScopeEdit"] == ("edits", "kinds", "scope")


ROOM = {
    "edits__edit": "class MemoryEdit(Edit): ...",
    "edits__kinds__scope__scope_edit": "class ScopeEdit(MemoryEdit): ...",
}


@pytest.mark.parametrize(
    ("rule", "sources"),
    [
        (kinds_known, {"edits__stack": "from kedit_lightning.edits.kinds.weights import X"}),
        (kinds_known, {"edits__forward_hooks": "from kedit_lightning.edits.kinds import scope"}),
        (kinds_known, {"edits__effects": "from .kinds import scope"}),
        (kinds_asked_for, {**ROOM, "edits__stack": "isinstance(edit, ScopeEdit)"}),
        (kinds_asked_for, {**ROOM, "runs__a": "isinstance(edit, (int, edits.ScopeEdit))"}),
        (kinds_asked_for, {**ROOM, "runs__a": "isinstance(edit, int | ScopeEdit)"}),
        (kinds_asked_for, {**ROOM, "callbacks__a": "match e:\n    case ScopeEdit():\n        f()"}),
        (kinds_asked_for, {**ROOM, "edits__kinds__weights": "isinstance(edit, ScopeEdit)"}),
    ],
)
def test_a_violation_is_reported(rule, sources):
    assert list(rule(planted(**sources)))


def test_a_kind_may_know_its_own():
    own = planted(**ROOM, edits__kinds__scope__memory="isinstance(edit, ScopeEdit)")
    assert list(kinds_asked_for(own)) == []
