"""Editing methods, by the names that papers use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit_lightning.methods.base import Capabilities, EditMethod
    from kedit_lightning.methods.finetune.ftm import FTM
    from kedit_lightning.methods.hypernetwork.instructedit import InstructEdit
    from kedit_lightning.methods.hypernetwork.ke import KE
    from kedit_lightning.methods.hypernetwork.malmen import MALMEN
    from kedit_lightning.methods.hypernetwork.mend import MEND
    from kedit_lightning.methods.hypernetwork.rledit import RLEdit
    from kedit_lightning.methods.in_context.ike import IKE
    from kedit_lightning.methods.locate.alphaedit import AlphaEdit
    from kedit_lightning.methods.locate.kn import KN
    from kedit_lightning.methods.locate.memit import EMMET, MEMIT, PMET
    from kedit_lightning.methods.locate.rome import ROME, RROME
    from kedit_lightning.methods.locate.ultraedit import UltraEdit
    from kedit_lightning.methods.memory.grace import GRACE
    from kedit_lightning.methods.memory.serac import SERAC

_HOMES = {
    "AlphaEdit": "locate.alphaedit",
    "EMMET": "locate.memit",
    "MEMIT": "locate.memit",
    "PMET": "locate.memit",
    "Capabilities": "base",
    "EditMethod": "base",
    "FTM": "finetune.ftm",
    "GRACE": "memory.grace",
    "IKE": "in_context.ike",
    "InstructEdit": "hypernetwork.instructedit",
    "KE": "hypernetwork.ke",
    "KN": "locate.kn",
    "MALMEN": "hypernetwork.malmen",
    "MEND": "hypernetwork.mend",
    "RLEdit": "hypernetwork.rledit",
    "ROME": "locate.rome",
    "RROME": "locate.rome",
    "SERAC": "memory.serac",
    "UltraEdit": "locate.ultraedit",
}
__all__ = [
    "EMMET",
    "FTM",
    "GRACE",
    "IKE",
    "KE",
    "KN",
    "MALMEN",
    "MEMIT",
    "MEND",
    "METHODS",
    "PMET",
    "ROME",
    "RROME",
    "SERAC",
    "AlphaEdit",
    "Capabilities",
    "EditMethod",
    "InstructEdit",
    "RLEdit",
    "UltraEdit",
]

#: Every editing method of this package.
METHODS = tuple(sorted(set(__all__) - {"METHODS", "Capabilities", "EditMethod"}))


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
