"""Edited models for other tools."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch

import kedit_lightning.edits
from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.row_logits import row_pass
from kedit_lightning.edits import Edit, materialise
from kedit_lightning.edits.adapter_state import refuse_adapted
from kedit_lightning.edits.gguf_adapter import gguf_library
from kedit_lightning.edits.materialisation import OneOrSeveral, edits_in
from kedit_lightning.edits.rank_truncation import truncate
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.runs.results import tell
from kedit_lightning.runs.saved_stack import load_stack

Export: TypeAlias = Literal["model", "adapter", "gguf-lora"]
#: Facts whose logits are compared where an export is not exact.
_COMPARED = 64


class Exports(Protocol):
    """What the edits of a method can be exported as."""

    @property
    def weights(self) -> bool:
        """As a full model."""

    @property
    def adapter(self) -> bool:
        """As a LoRA adapter."""


def check_export(
    export: Export | None, can: Exports, output: str | Path | None, rank: int | None = None
) -> None:
    """Refuse an export that is impossible.

    Raises:
        UnsupportedUseError: There is no folder, or the method's edits cannot be exported like this.
        MissingExtraError: The package that writes it is not installed.
    """
    if rank is not None and export in (None, "model"):
        raise UnsupportedUseError(
            "--export_rank cuts an adapter off; add --export adapter or --export gguf-lora"
        )
    if export is None:
        return
    if output is None:
        raise UnsupportedUseError(f"--export {export} needs a folder to write to; add --output DIR")
    if not can.weights and not can.adapter:
        raise UnsupportedUseError(
            f"edits of this method change no weights that --export {export} could write; leave "
            "out --export and keep the saved edits"
        )
    if export == "model" and not can.weights:
        raise UnsupportedUseError(
            "edits of this method change no weights that --export model could write; use --export "
            "adapter"
        )
    if export != "model" and not can.adapter and rank is None:
        raise UnsupportedUseError(
            f"edits of this method have no low rank, which --export {export} writes; use --export "
            "model, or have them cut off at a rank, with what is lost said (--export_rank 64)"
        )
    if export == "gguf-lora":
        gguf_library()


def saved_edits(
    folder: Path, base: BaseModel, export: Export | None, rank: int | None = None
) -> list[Edit]:
    """The edits that a run has saved, exported on request; says so."""
    edits = load_stack(folder, base)
    tell(f"{len(edits)} edit{'s' * (len(edits) != 1)} saved in {folder}")
    if export is not None:
        tell(f"exported to {export_edits(base, edits, folder, export, rank)}")
    return edits


def export_edits(
    base: BaseModel,
    edits: OneOrSeveral[Edit],
    folder: Path,
    export: Export,
    rank: int | None = None,
) -> Path:
    """Write all edits into a copy of the model, or into one adapter; returns where it is.

    Args:
        base: The base model.
        edits: The edits, in order, or one.
        folder: The folder in which it gets a folder of its own.
        export: What is written.
        rank: The largest rank of an adapter; what is lost is said.
    """
    edits = edits_in(edits)
    if len(edits) > 1 and len({edit.origin.stack for edit in edits}) == 1:
        warnings.warn(
            f"the {len(edits)} exported edits were computed apart from each other; together they "
            "may act otherwise than the table shows; use --trainer.protocol.mode sequential or "
            "batch for edits that are computed together",
            stacklevel=2,
        )
    target = folder / export
    if export != "model":
        if rank is not None:
            edits = _of_rank(base, edits, rank)
        # By their full names: they import peft, which takes seconds.
        if export == "adapter":
            return kedit_lightning.edits.save_adapter(base, edits, target)
        return kedit_lightning.edits.save_gguf_adapter(base, edits, target / "adapter.gguf")
    refuse_adapted(base.model, "--export model")
    model: Any = materialise(base, edits)
    model.save_pretrained(target)
    base.tokenizer.save_pretrained(target)
    return target


class LogitError(NamedTuple):
    """How far one way to hold edits is from another, at the tokens of their facts.

    Args:
        largest: The largest difference of a logit.
        mean: The mean of the absolute differences.
        changed: Facts of which a token of the wanted answer is the most likely one in one way, and
            not in the other.
        facts: Facts that were compared.
    """

    largest: float
    mean: float
    changed: int
    facts: int


@torch.no_grad()
def logit_error(
    base: BaseModel, edits: OneOrSeveral[Edit], others: OneOrSeveral[Edit]
) -> LogitError:
    """Compare the logits under two stacks, on prompts and answers of the facts of the first one.

    Args:
        base: The base model; it is as it was afterwards.
        edits: The edits, in order, or one; of their facts the last 64 are asked.
        others: What is to act as they do.
    """
    edits = edits_in(edits)
    requests = [request for edit in edits for request in edit.origin.requests][-_COMPARED:]
    rows = [base.encode(r.prompt, r.target_new, image=r.image) for r in requests]
    largest, total, count, changed = 0.0, 0.0, 0, 0
    with base.edits.restored():
        seen = []
        for stack in (edits, edits_in(others)):
            base.edits.clear()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r"edit \S+ .*was computed on top of")
                for edit in stack:
                    edit.apply()
            seen.append([row_pass(base, row, None).logits[0] for row in rows])
    for row, one, other in zip(rows, *seen, strict=True):
        difference = (one - other).abs()
        largest = max(largest, float(difference.max()))
        total, count = total + float(difference.double().sum()), count + difference.numel()
        answer = torch.tensor(row.answer, device=one.device)
        # The last column of a decoder alone predicts what follows the answer.
        end = len(one) - (not base.is_encoder_decoder)
        at = slice(end - len(row.answer), end)
        held = [bool((logits[at].argmax(-1) == answer).all()) for logits in (one, other)]
        changed += held[0] != held[1]
    return LogitError(largest, total / max(1, count), changed, len(rows))


def _of_rank(base: BaseModel, edits: Sequence[Edit], rank: int) -> list[Edit]:
    """The edits as one of a rank; says how far it is from them."""
    found = truncate(base, edits, rank)
    if found.exact:
        tell(f"the adapter is exact: no change has a higher rank than {rank}")
        return [found.edit]
    error = logit_error(base, edits, [found.edit])
    worst, share = max(found.lost.items(), key=lambda pair: pair[1])
    tell(
        f"cut off at rank {rank}: '{worst}' lacks {share:.1%} of its change, the most of "
        f"{len(found.lost)}; logits of {error.facts} facts differ by {error.largest:.3g} at most, "
        f"{error.mean:.2g} on average, which changes whether they hold for {error.changed} of them"
    )
    return [found.edit]
