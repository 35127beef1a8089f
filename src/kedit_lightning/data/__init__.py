"""Datasets of edit requests and their probes, as text; tokens belong to the base model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit_lightning.data.base import EditDataModule, Split
    from kedit_lightning.data.counterfact import CounterFact
    from kedit_lightning.data.nano import NanoFacts
    from kedit_lightning.data.requests_file import Requests
    from kedit_lightning.data.texts import TextBatch, Texts
    from kedit_lightning.data.zsre import ZsRE

__all__ = [
    "CounterFact",
    "EditDataModule",
    "NanoFacts",
    "Requests",
    "Split",
    "TextBatch",
    "Texts",
    "ZsRE",
]

_MODULES = {
    "CounterFact": "counterfact",
    "EditDataModule": "base",
    "NanoFacts": "nano",
    "Requests": "requests_file",
    "Split": "base",
    "TextBatch": "texts",
    "Texts": "texts",
    "ZsRE": "zsre",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when it is first asked for: Lightning takes seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
