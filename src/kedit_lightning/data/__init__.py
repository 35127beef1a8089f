"""Datasets of edit requests and their probes, as text; tokens belong to the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedit_lightning.registry import lazy_exports

if TYPE_CHECKING:
    from kedit_lightning.data.datamodule import EditDataModule, SkipRecord, Split
    from kedit_lightning.data.knowledge.counterfact import CounterFact
    from kedit_lightning.data.knowledge.nano import NanoFacts
    from kedit_lightning.data.knowledge.requests_file import Requests
    from kedit_lightning.data.knowledge.zsre import ZsRE
    from kedit_lightning.data.records import Fields
    from kedit_lightning.data.text.texts import TextBatch, Texts

__all__ = [
    "CounterFact",
    "EditDataModule",
    "Fields",
    "NanoFacts",
    "Requests",
    "SkipRecord",
    "Split",
    "TextBatch",
    "Texts",
    "ZsRE",
]

__getattr__ = lazy_exports(
    "dataset",
    {
        "EditDataModule": "kedit_lightning.data.datamodule",
        "Fields": "kedit_lightning.data.records",
        "SkipRecord": "kedit_lightning.data.datamodule",
        "Split": "kedit_lightning.data.datamodule",
        "TextBatch": "kedit_lightning.data.text.texts",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
