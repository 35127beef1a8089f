"""Rule 4: settings are read once, into a dataclass that type checkers see."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from typing import get_type_hints

import pytest
from jsonargparse._parameter_resolvers import get_signature_parameters
from source_tree import check, modules, planted

from kedit_lightning import methods
from kedit_lightning.methods.method import EditMethod, MethodSettings

#: Parts that may read hyperparameters by name: the base class, results, what runs record.
READERS = {"callbacks", "runs", "methods.method"}
#: Lightning's own hooks, which are handed checkpoints of hyperparameters.
HOOKS = {"on_load_checkpoint", "on_save_checkpoint"}


def by_name(tree):
    """Look-ups of hyperparameters: ``hparams["x"]``, ``hparams.x`` and ``hparams.get("x")``."""
    for module in tree:
        if module.name in READERS or module.parts[0] in READERS:
            continue
        hooks = {
            id(node)
            for function in ast.walk(module.tree)
            if isinstance(function, ast.FunctionDef) and function.name in HOOKS
            for node in ast.walk(function)
        }
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Subscript | ast.Attribute)
                and isinstance(node.value, ast.Attribute)
                and node.value.attr == "hparams"
                and id(node) not in hooks
            ):
                yield f"{module.name}:{node.lineno} reads {ast.unparse(node)}"


def mismatches(method):
    """Differences between a method's settings and the parameters of its constructor."""
    parameters = {
        parameter.name: parameter.annotation
        for parameter in get_signature_parameters(method, "__init__")
        if parameter.name not in method.unsaved
    }
    types = get_type_hints(method.settings_type)
    listed = {field.name: types[field.name] for field in fields(method.settings_type)}
    for name in sorted(parameters.keys() ^ listed.keys()):
        where = "settings" if name in listed else "constructor"
        yield f"{method.__name__}: only the {where} has {name}"
    for name in sorted(parameters.keys() & listed.keys()):
        if parameters[name] != listed[name]:
            yield f"{method.__name__}.{name}: {parameters[name]} is not {listed[name]}"


def test_no_hyperparameter_is_looked_up_by_name():
    check(by_name(modules()))


@pytest.mark.parametrize("name", methods.METHODS)
def test_settings_list_the_parameters_of_the_constructor(name):
    method = getattr(methods, name)
    check(mismatches(method))
    assert method.settings_type.__dataclass_params__.frozen
    assert issubclass(method.settings_type, MethodSettings)


@pytest.mark.parametrize(
    "line",
    [
        'x = self.hparams["lr"]',
        "x = self.hparams.lr",
        'x = method.hparams.get("lr")',
        'self.hparams["lr"] = 1',
    ],
)
def test_a_look_up_is_reported(line):
    assert list(by_name(planted(methods__a=line)))
    assert list(by_name(planted(runs__results=line))) == []


@dataclass(frozen=True)
class Listed(MethodSettings):
    lr: float
    steps: int


class Matching(EditMethod):
    settings_type = Listed

    def __init__(
        self, lr: float = 1.0, steps: int = 2, base_model: str = "nano", seed: int | None = None
    ):
        super().__init__(base_model, seed)


class Lacking(EditMethod):
    settings_type = Listed

    def __init__(self, lr: float = 1.0, base_model: str = "nano", seed: int | None = None):
        super().__init__(base_model, seed)


class Unlisted(Matching):
    def __init__(self, rank: int = 3, **settings: object):
        super().__init__(**settings)


class Mistyped(EditMethod):
    settings_type = Listed

    def __init__(
        self, lr: float = 1.0, steps: str = "", base_model: str = "nano", seed: int | None = None
    ):
        super().__init__(base_model, seed)


@pytest.mark.parametrize(
    ("method", "expected"),
    [(Matching, 0), (Lacking, 1), (Unlisted, 1), (Mistyped, 1)],
)
def test_a_mismatch_is_reported(method, expected):
    assert len(list(mismatches(method))) == expected
