"""Datasets of edit requests and their probes, as text; tokens belong to the base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedit_lightning.registry import lazy_exports

if TYPE_CHECKING:
    from kedit_lightning.data.datamodule import EditDataModule, Split
    from kedit_lightning.data.knowledge.akew import AKEW
    from kedit_lightning.data.knowledge.cknowedit import CKnowEdit
    from kedit_lightning.data.knowledge.conceptedit import ConceptEdit
    from kedit_lightning.data.knowledge.counterfact import CounterFact
    from kedit_lightning.data.knowledge.facts_30m import Facts30M
    from kedit_lightning.data.knowledge.hallueditbench import HalluEditBench
    from kedit_lightning.data.knowledge.knowedit import KnowEdit
    from kedit_lightning.data.knowledge.known_facts import KnownFacts
    from kedit_lightning.data.knowledge.leme import LEME
    from kedit_lightning.data.knowledge.mquake import MQuAKE
    from kedit_lightning.data.knowledge.nano import NanoFacts
    from kedit_lightning.data.knowledge.qaedit import QAEdit
    from kedit_lightning.data.knowledge.requests_file import Requests
    from kedit_lightning.data.knowledge.rippleedits import RippleEdits
    from kedit_lightning.data.knowledge.truthfulqa import TruthfulQA
    from kedit_lightning.data.knowledge.unke import EditEverything, UnKE
    from kedit_lightning.data.knowledge.wikibigedit import WikiBigEdit
    from kedit_lightning.data.knowledge.zsre import ZsRE
    from kedit_lightning.data.multimodal.adsedit import ADSEdit
    from kedit_lightning.data.multimodal.comprehendedit import ComprehendEdit
    from kedit_lightning.data.multimodal.mmedit import EIC, EVQA
    from kedit_lightning.data.multimodal.shapes import Shapes
    from kedit_lightning.data.record_parsing import SkipRecord
    from kedit_lightning.data.records import Fields
    from kedit_lightning.data.safety.safeedit import SafeEdit
    from kedit_lightning.data.text.texts import TextBatch, Texts
    from kedit_lightning.data.traits.personalityedit import PersonalityEdit

__all__ = [
    "AKEW",
    "EIC",
    "EVQA",
    "LEME",
    "ADSEdit",
    "CKnowEdit",
    "ComprehendEdit",
    "ConceptEdit",
    "CounterFact",
    "EditDataModule",
    "EditEverything",
    "Facts30M",
    "Fields",
    "HalluEditBench",
    "KnowEdit",
    "KnownFacts",
    "MQuAKE",
    "NanoFacts",
    "PersonalityEdit",
    "QAEdit",
    "Requests",
    "RippleEdits",
    "SafeEdit",
    "Shapes",
    "SkipRecord",
    "Split",
    "TextBatch",
    "Texts",
    "TruthfulQA",
    "UnKE",
    "WikiBigEdit",
    "ZsRE",
]

__getattr__ = lazy_exports(
    "dataset",
    {
        "EditDataModule": "kedit_lightning.data.datamodule",
        "Fields": "kedit_lightning.data.records",
        "SkipRecord": "kedit_lightning.data.record_parsing",
        "Split": "kedit_lightning.data.datamodule",
        "TextBatch": "kedit_lightning.data.text.texts",
    },
)


def __dir__() -> list[str]:
    return sorted(__all__)
