"""Editing methods, by the names that papers use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedit_lightning.registry import entries, lazy_exports

if TYPE_CHECKING:
    from kedit_lightning.methods.decoding.deco import DeCo
    from kedit_lightning.methods.decoding.dola import DoLa
    from kedit_lightning.methods.finetune.adalora import AdaLoRA
    from kedit_lightning.methods.finetune.crispedit import CrispEdit
    from kedit_lightning.methods.finetune.ftl import FTL
    from kedit_lightning.methods.finetune.ftm import FTM
    from kedit_lightning.methods.finetune.locftbf import LocFTBF
    from kedit_lightning.methods.finetune.lora import DPOEdit, LoRA, QLoRA
    from kedit_lightning.methods.hypernetwork.instructedit import InstructEdit
    from kedit_lightning.methods.hypernetwork.ke.ke import KE
    from kedit_lightning.methods.hypernetwork.malmen.malmen import MALMEN
    from kedit_lightning.methods.hypernetwork.mend.mend import MEND
    from kedit_lightning.methods.hypernetwork.rledit import RLEdit
    from kedit_lightning.methods.in_context.ice import ICE
    from kedit_lightning.methods.in_context.ike import IKE
    from kedit_lightning.methods.in_context.mello import MeLLo
    from kedit_lightning.methods.in_context.prompt import PROMPT
    from kedit_lightning.methods.locate.alphaedit import AlphaEdit
    from kedit_lightning.methods.locate.anyedit import AnyEdit
    from kedit_lightning.methods.locate.block_output import UnKE
    from kedit_lightning.methods.locate.kn import KN
    from kedit_lightning.methods.locate.lyaplock import LyapLock
    from kedit_lightning.methods.locate.memit import EMMET, MEMIT, PMET
    from kedit_lightning.methods.locate.nse import NSE
    from kedit_lightning.methods.locate.rome import ROME, RROME
    from kedit_lightning.methods.locate.ultraedit import UltraEdit
    from kedit_lightning.methods.memory.calinet import CaliNet
    from kedit_lightning.methods.memory.defer import DEFER
    from kedit_lightning.methods.memory.grace import GRACE
    from kedit_lightning.methods.memory.melo import MELO
    from kedit_lightning.methods.memory.memoir import MEMOIR
    from kedit_lightning.methods.memory.serac.serac import SERAC
    from kedit_lightning.methods.memory.tpatcher.tpatcher import TPatcher
    from kedit_lightning.methods.memory.wise import WISE
    from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
    from kedit_lightning.methods.safety.dinm.dinm import DINM

__getattr__ = lazy_exports(
    "method",
    dict.fromkeys(
        ("Capabilities", "EditMethod", "MethodSettings"), "kedit_lightning.methods.method"
    ),
)

#: Every editing method of this package.
METHODS = tuple(entries("method"))

__all__ = [
    "DEFER",
    "DINM",
    "EMMET",
    "FTL",
    "FTM",
    "GRACE",
    "ICE",
    "IKE",
    "KE",
    "KN",
    "MALMEN",
    "MELO",
    "MEMIT",
    "MEMOIR",
    "MEND",
    "METHODS",
    "NSE",
    "PMET",
    "PROMPT",
    "ROME",
    "RROME",
    "SERAC",
    "WISE",
    "AdaLoRA",
    "AlphaEdit",
    "AnyEdit",
    "CaliNet",
    "Capabilities",
    "CrispEdit",
    "DPOEdit",
    "DeCo",
    "DoLa",
    "EditMethod",
    "InstructEdit",
    "LoRA",
    "LocFTBF",
    "LyapLock",
    "MeLLo",
    "MethodSettings",
    "QLoRA",
    "RLEdit",
    "TPatcher",
    "UltraEdit",
    "UnKE",
]


def __dir__() -> list[str]:
    return sorted(__all__)
