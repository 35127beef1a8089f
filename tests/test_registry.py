"""Every list, lazy export, config name and table agrees with the registry."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import fields
from importlib import import_module
from typing import get_args

import pytest
import yaml
from lightning.pytorch import Callback, LightningDataModule
from places import ROOT

from kedit_lightning import callbacks, data, methods, registry
from kedit_lightning.registry import Entry, Kind, entries, register
from kedit_lightning.task_registry import tasks

PACKAGE = {"method": "methods", "dataset": "data", "metric": "metrics", "callback": "callbacks"}
CONFIGS = {"method": ("methods", "model"), "dataset": ("data", "data")}
ALL = [pytest.param(e, id=e.name) for kind in get_args(Kind) for e in entries(kind).values()]


@pytest.mark.parametrize("entry", ALL)
def test_an_entry_names_a_class_with_a_docstring(entry):
    kind = entry.load()
    assert kind.__name__ == entry.name
    assert kind.__module__.startswith(entry.module)
    assert kind.__doc__
    assert entry.summary


@pytest.mark.parametrize("entry", ALL)
def test_a_package_exports_its_entries(entry):
    package = import_module(f"kedit_lightning.{PACKAGE[entry.kind]}")
    assert getattr(package, entry.name) is entry.load()
    assert entry.name in package.__all__
    assert entry.name in dir(package)


@pytest.mark.parametrize("package", ["methods", "data", "callbacks"])
def test_type_checkers_see_what_a_package_exports(package):
    module = import_module(f"kedit_lightning.{package}")
    tree = ast.parse((ROOT / module.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(module.__all__) - {"METHODS"} <= imported
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_packages_export_no_class_without_an_entry():
    for package, kind, base in (
        (methods, "method", methods.EditMethod),
        (callbacks, "callback", Callback),
        (data, "dataset", LightningDataModule),
    ):
        classes = {
            name
            for name in package.__all__
            if isinstance(getattr(package, name), type) and issubclass(getattr(package, name), base)
        }
        assert classes - {"EditMethod", "EditDataModule"} == set(entries(kind)), package
    assert tuple(entries("method")) == methods.METHODS


@pytest.mark.parametrize("kind", CONFIGS)
def test_entries_and_packaged_configs_belong_together(kind):
    folder, key = CONFIGS[kind]
    named = {entry.config: entry.name for entry in entries(kind).values()}
    files = {f"{folder}/{path.stem}": path for path in (ROOT / "configs" / folder).glob("*.yaml")}
    assert named.keys() == files.keys()
    for config, path in files.items():
        assert yaml.safe_load(path.read_text())[key]["class_path"] == named[config]


def test_configs_of_variants_name_methods():
    for path in (ROOT / "configs" / "variants").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["model"]["class_path"] in entries("method")


def test_tasks_and_packaged_configs_belong_together():
    folder = ROOT / "configs" / "tasks"
    assert {path.stem for path in folder.glob("*.yaml")} == set(tasks())
    for name, task in tasks().items():
        values = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        assert task.file == folder / f"{name}.yaml"
        assert values["data"]["class_path"] == task.dataset in entries("dataset")
        assert values.keys() <= {"data", "trainer", "methods"}
        assert set(task.metrics) <= set(entries("metric"))
        assert task.metrics
        for method, settings in task.method_settings().items():
            known = fields(entries("method")[method].load().settings_type)
            assert settings.keys() <= {field.name for field in known}, (name, method)


def test_the_tables_of_the_documentation_are_those_of_the_registry():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "registry_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for name in tables.TABLES:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert tables.with_table(name) == text, "run python tools/registry_tables.py"
    assert len(list(tables.methods_table())) - 2 == len(entries("method"))
    shown = {line.split("|")[1].strip(" `"): line for line in tables.methods_table()}
    assert all(entry.summary in shown[entry.name] for entry in entries("method").values())


def test_an_entry_of_the_same_name_replaces_another(monkeypatch):
    kinds = {kind: dict(found) for kind, found in registry._ENTRIES.items()}
    monkeypatch.setattr(registry, "_ENTRIES", kinds)
    entry = register(Entry("method", "ROME", "somewhere", "another"))
    assert entries("method")["ROME"] is entry
    assert list(entries("method")) == sorted(entries("method"))
