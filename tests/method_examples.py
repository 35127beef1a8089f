"""Every method, with settings for tiny base models."""

from __future__ import annotations

from pathlib import Path

from support import TASKS

from kedit_lightning import BaseModel, EditRequest, methods
from kedit_lightning.methods import EditMethod
from kedit_lightning.requests import EditExample

POOL = [EditExample.from_request(EditRequest("Oslo is in", "Peru", "Oslo"), "oslo")]
DECOMPOSITIONS = str(Path(__file__).parent / "samples" / "decompositions.json")
#: Name and settings of each method; settings that make it quick, not good.
LOCATE = {"statistics": "identity", "contexts": 2, "steps": 4}
METHODS = [
    ("AdaLoRA", {"lr": 1e-2, "steps": 5}),
    ("AlphaEdit", LOCATE),
    ("AnyEdit", {"statistics": "identity", "steps": 4, "window": 2, "preserve": 1.0}),
    ("CaliNet", {"slots": 8, "steps": 8, "lr": 0.1, "silence_weight": 0.01, "irrelevant": 2}),
    ("CrispEdit", {"lr": 1e-2, "steps": 3, "energy": 0.5, "text_tokens": 16}),
    ("DeCo", {"alpha": 20.0}),
    ("DoLa", {}),
    ("DINM", {"lr": 1e-2, "steps": 4, "suffix": ""}),
    ("DPOEdit", {"lr": 1e-2, "steps": 5}),
    ("DEFER", {"steps": 10, "lr": 0.1}),
    ("EMMET", LOCATE),
    ("FTL", {"lr": 1e-2, "steps": 3}),
    ("FTM", {"lr": 1e-2, "steps": 3}),
    ("GRACE", {"radius": 1e-2, "steps": 3}),
    ("ICE", {"top_k": 2}),
    ("IKE", {"pool": POOL, "demonstrations": 1}),
    ("InstructEdit", {"checkpoint": "none", "edit_lr": 1e-2, "tasks": TASKS}),
    ("LocFTBF", {"lr": 1e-2, "steps": 3}),
    ("KE", {"checkpoint": "none", "max_scale": 10.0}),
    ("KN", {"steps": 3}),
    ("LoRA", {"lr": 1e-2, "steps": 5}),
    ("LyapLock", {**LOCATE, "preserve": 1.0}),
    ("MALMEN", {"checkpoint": "none", "edit_lr": 1e-2}),
    ("MELO", {"steps": 4, "lr": 0.1}),
    ("MEMIT", {**LOCATE, "preserve": 1.0}),
    ("MEMOIR", {"steps": 8, "contexts": 1, "lr": 2.0}),
    ("MEND", {"checkpoint": "none", "edit_lr": 1e-2}),
    ("MeLLo", {"decompositions": DECOMPOSITIONS}),
    ("NSE", {**LOCATE, "preserve": 1.0, "neuron_share": 0.8}),
    ("PMET", {**LOCATE, "preserve": 1.0}),
    ("PROMPT", {}),
    ("RLEdit", {"checkpoint": "none", "edit_lr": 1e-2}),
    ("ROME", LOCATE),
    ("RROME", LOCATE),
    ("SERAC", {"checkpoint": "none"}),
    ("TPatcher", {"steps": 3}),
    ("UltraEdit", {"lr": 1e-2}),
    ("UnKE", {"steps": 4, "lr": 1e-2, "texts": 2, "value_steps": 4}),
    ("WISE", {"steps": 8, "contexts": 1, "lr": 2.0}),
]


def make(name: str, settings: dict, base: BaseModel | str) -> EditMethod:
    """The method with a name."""
    method: EditMethod = getattr(methods, name)(base_model=base, **settings)
    return method
