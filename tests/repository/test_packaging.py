"""The hand-written package list must not drift from the tree, and importing must stay cheap."""

import ast
import subprocess
import sys
import time
import tomllib
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
from places import ROOT

import kedit_lightning

SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PLACES = {
    "kedit_lightning": ROOT / "src" / "kedit_lightning",
    "kedit_lightning.callbacks": ROOT / "callbacks",
    "kedit_lightning.configs": ROOT / "configs",
}


def folder(package):
    """The folder of a package, by the longest mapped name it starts with."""
    place = max((name for name in PLACES if f"{package}.".startswith(f"{name}.")), key=len)
    return PLACES[place].joinpath(*package.removeprefix(place).split("."))


def packages_in_tree():
    for name, place in PLACES.items():
        for init in place.rglob("__init__.py"):
            yield ".".join((name, *init.parent.relative_to(place).parts))


def test_package_list_matches_the_tree():
    assert set(packages_in_tree()) == set(SETUP["packages"])


def test_every_data_file_ships():
    shipped = {
        path
        for package, patterns in SETUP["package-data"].items()
        for pattern in patterns
        for path in folder(package).glob(pattern)
    }
    left_out = [
        str(path.relative_to(ROOT))
        for place in PLACES.values()
        for path in place.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and path not in shipped
    ]
    assert left_out == []


@pytest.mark.parametrize("name", ["callbacks", "configs"])
def test_folders_at_the_top_are_sub_packages(name):
    module = import_module(f"kedit_lightning.{name}")
    assert Path(module.__file__).is_relative_to(ROOT / name)


def test_callbacks_are_refused_under_their_folder_name():
    # under a second name every class would exist twice, and the CLI would know only one of them
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import callbacks"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "kedit_lightning.callbacks" in done.stderr


def test_packaged_configs_are_found_through_the_package():
    found = {path.name for path in files("kedit_lightning.configs").joinpath("methods").iterdir()}
    assert found >= {path.name for path in (ROOT / "configs" / "methods").glob("*.yaml")}


def test_import_is_lazy_and_fast():
    code = (
        "import sys; import kedit_lightning; "
        "print(*sorted({'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):  # the fastest of three: other processes share the machine
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - began)
        assert done.stdout.strip() == ""
    assert min(seconds) < 1.0


@pytest.mark.slow
def test_a_base_model_and_a_method_load_no_other_method():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from kedit_lightning import BaseModel, EditRequest\n"
        "from kedit_lightning.methods import FTM\n"
        "request = EditRequest(prompt='Lyon lies in', target_new='Peru', subject='Lyon')\n"
        "FTM(base_model=BaseModel.load('nano'), steps=1).edit([request])\n"
        "from kedit_lightning.registry import entries\n"
        "modules = {entry.module for entry in entries('method').values()}\n"
        "print(*sorted(modules & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "kedit_lightning.methods.finetune.ftm"


def test_public_names_arrive_from_their_modules():
    for name in kedit_lightning.__all__:
        assert getattr(kedit_lightning, name) is not None
    assert set(kedit_lightning.__all__) <= set(dir(kedit_lightning))


def test_type_checkers_and_the_interpreter_see_the_same_names():
    tree = ast.parse(Path(kedit_lightning.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert seen == kedit_lightning._MODULE_OF
    assert set(seen) | {"__version__"} == set(kedit_lightning.__all__)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="NoSuchName"):
        kedit_lightning.NoSuchName  # noqa: B018
