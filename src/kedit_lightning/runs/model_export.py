"""Edited models for other tools."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import kedit_lightning.edits
from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit, materialise
from kedit_lightning.edits.adapter_state import refuse_adapted
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.runs.results import tell
from kedit_lightning.runs.saved_stack import load_stack

Export: TypeAlias = Literal["model", "adapter"]


class Exports(Protocol):
    """What the edits of a method can be exported as."""

    @property
    def weights(self) -> bool:
        """As a full model."""

    @property
    def adapter(self) -> bool:
        """As a LoRA adapter."""


def check_export(export: Export | None, can: Exports, output: str | Path | None) -> None:
    """Refuse an export that is impossible.

    Raises:
        UnsupportedUseError: There is no folder, or the method's edits cannot be exported like this.
    """
    if export is None:
        return
    if output is None:
        raise UnsupportedUseError(f"--export {export} needs a folder to write to; add --output DIR")
    if not (can.weights if export == "model" else can.adapter):
        keep = "leave out --export and keep the saved edits"
        way_out = "use --export model" if can.weights else keep
        raise UnsupportedUseError(
            f"edits of this method change no weights that --export {export} could write; {way_out}"
        )


def saved_edits(folder: Path, base: BaseModel, export: Export | None) -> list[Edit]:
    """The edits that a run has saved, exported on request; says so."""
    edits = load_stack(folder, base)
    tell(f"{len(edits)} edit{'s' * (len(edits) != 1)} saved in {folder}")
    if export is not None:
        tell(f"exported to {export_edits(base, edits, folder, export)}")
    return edits


def export_edits(base: BaseModel, edits: Sequence[Edit], folder: Path, export: Export) -> Path:
    """Write all edits into a copy of the model, or into one adapter; returns its folder."""
    if len(edits) > 1 and len({edit.origin.stack for edit in edits}) == 1:
        warnings.warn(
            f"the {len(edits)} exported edits were computed apart from each other; together they "
            "may act otherwise than the table shows; use --trainer.protocol.mode sequential or "
            "batch for edits that are computed together",
            stacklevel=2,
        )
    target = folder / export
    if export == "adapter":
        # By its full name: it imports peft, which takes seconds.
        return kedit_lightning.edits.save_adapter(base, edits, target)
    refuse_adapted(base.model, "--export model")
    model: Any = materialise(base, edits)
    model.save_pretrained(target)
    base.tokenizer.save_pretrained(target)
    return target
