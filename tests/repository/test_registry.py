"""Rule 5: one registry entry for each method, dataset, metric and callback."""

from __future__ import annotations

import ast
from typing import get_args

import pytest
import yaml
from places import ROOT
from source_tree import check, modules, planted

from kedit_lightning.registry import Entry, Kind, entries

CONFIGS = ROOT / "configs"
#: The package of each kind, and the classes from which all others of the kind derive.
KINDS = {
    "method": ("methods", {"EditMethod"}),
    "dataset": ("data", {"EditDataModule", "LightningDataModule"}),
    "callback": ("callbacks", {"EditCallback", "Callback"}),
}


def classes_of(tree, package, roots):
    """Classes of a package that derive from its roots, by name."""
    bases = {}
    for module in tree:
        if module.parts[0] == package:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = {ast.unparse(base).split("[")[0] for base in node.bases}
    derived = set(roots)
    while (
        grown := {
            name for name, above in bases.items() if {b.split(".")[-1] for b in above} & derived
        }
        - derived
    ):
        derived |= grown
    return derived - roots


def exported(tree, package):
    """Names in ``__all__`` of a package."""
    for module in tree:
        if module.parts == (package,):
            for node in module.tree.body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    return {element.value for element in node.value.elts}
    return set()


def unequal(tree, kind, registered):
    """Classes that are exported and not in the registry, or in the registry and not exported."""
    package, roots = KINDS[kind]
    public = exported(tree, package) & classes_of(tree, package, roots)
    for name in sorted(public ^ set(registered)):
        where = "exported" if name in public else "registered"
        yield f"{kind} {name} is {where} only"


def without_config(registered, configs=CONFIGS):
    """Entries whose packaged config is absent or makes another class."""
    for entry in registered:
        if not entry.config:
            continue
        path = configs / f"{entry.config}.yaml"
        if not path.is_file():
            yield f"{entry.name} names {entry.config}, which is absent"
            continue
        part = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get(
            {"method": "model", "dataset": "data"}.get(entry.kind, entry.kind), {}
        )
        if part.get("class_path", "").split(".")[-1] != entry.name:
            yield f"{entry.config} does not make {entry.name}"


@pytest.mark.parametrize("kind", KINDS)
def test_exports_and_registry_name_the_same(kind):
    check(unequal(modules(), kind, entries(kind)))


def test_methods_datasets_metrics_and_callbacks_are_registered():
    assert {"method", "dataset", "metric", "callback"} <= set(get_args(Kind))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_entry_is_loaded_and_says_what_it_is(kind):
    for name, entry in entries(kind).items():
        assert entry.load().__name__ == name
        assert entry.summary


@pytest.mark.parametrize("kind", get_args(Kind))
def test_configs_make_what_the_registry_says(kind):
    check(without_config(entries(kind).values()))


@pytest.mark.parametrize(("kind", "folder"), [("method", "methods"), ("dataset", "data")])
def test_every_config_has_an_entry(kind, folder):
    named = {entry.config for entry in entries(kind).values()}
    assert {f"{folder}/{path.stem}" for path in (CONFIGS / folder).glob("*.yaml")} == named


def test_violations_are_reported(tmp_path):
    tree = planted(
        methods__='__all__ = ["ROME", "EditMethod", "NEW"]',
        methods__a="class ROME(EditMethod): ...\nclass NEW(ROME): ...\nclass _Part(ROME): ...",
    )
    assert list(unequal(tree, "method", {"ROME": 0, "NEW": 0})) == []
    assert list(unequal(tree, "method", {"ROME": 0})) == ["method NEW is exported only"]
    assert list(unequal(tree, "method", {"ROME": 0, "NEW": 0, "X": 0})) == [
        "method X is registered only"
    ]
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "rome.yaml").write_text("model:\n  class_path: MEMIT\n")
    for name in ("rome", "absent"):
        entry = Entry("method", "ROME", "a", "rank one", f"methods/{name}")
        assert len(list(without_config([entry], tmp_path))) == 1
    assert list(without_config([Entry("method", "MEMIT", "a", "", "methods/rome")], tmp_path)) == []
