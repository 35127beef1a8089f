"""Rule 7: callbacks of ours derive from the class that declares their hooks."""

from __future__ import annotations

import inspect
from importlib import import_module

from lightning.pytorch import Callback
from source_tree import check, modules

from kedit_lightning import benchmark


def strangers(classes):
    """Callbacks that do not derive from ``EditCallback``."""
    for kind in classes:
        if issubclass(kind, Callback) and not issubclass(kind, benchmark.EditCallback):
            yield f"{kind.__module__}.{kind.__name__}"


def own_classes():
    for module in modules():
        if module.parts[0] == "callbacks":
            loaded = import_module(f"kedit_lightning.{module.name}")
            for _, kind in inspect.getmembers(loaded, inspect.isclass):
                if kind.__module__ == loaded.__name__:
                    yield kind


def test_every_callback_of_ours_derives_from_edit_callback():
    check(strangers(own_classes()))


def test_a_stranger_is_reported():
    class Stranger(Callback): ...

    class Own(benchmark.EditCallback): ...

    assert len(list(strangers([Stranger, Own]))) == 1
