"""GRACE: a codebook of keys and values beside one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, TokenRows
from kedit_lightning.base_models.taps import capture, change_output, stop_after
from kedit_lightning.edits import CodebookEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.codebook.codebook import (
    Codebook,
    CodebookEntry,
    Replacement,
    replace_rows,
    write_entry,
)
from kedit_lightning.edits.kinds.codebook.codebook_edit import stacked_codebook
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.memory.grace_defaults import default_module
from kedit_lightning.methods.method import Capabilities, EditMethod
from kedit_lightning.methods.shared.losses import answer_nll
from kedit_lightning.requests import EditRequest


class GRACE(EditMethod):
    """Remembers, for each fact, the input of a layer and an output that gives the new answer.

    The input at the last token of the prompt is the key. A prompt whose key lies within the radius
    of a remembered one gets the remembered output; all other prompts pass untouched, bit for bit.
    So prompts in other words are rarely recognised: reliability and locality are high and
    generalisation is low, as published. Nothing is trained but the output of the fact that is
    written. Paper: https://arxiv.org/abs/2211.11031.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose down projection gets the codebook, negative numbers from the end. When
            absent the published one of a known model, or else one in the upper third.
        module: Name of the module instead, such as ``transformer.h.35.mlp.c_fc``.
        radius: Distance within which a key is recognised, as it stands for a new entry. Lengths of
            keys differ by model and layer: an edit records the length of its key and the distance
            to the nearest other one.
        lr: Step size of Adam on the value.
        steps: Steps of Adam on the value.
        value_init: ``cold`` starts from random numbers between 0 and 1, ``warm`` from the layer's
            own output.
        replacement: Tokens of a recognised prompt that get the value: its ``last``, the whole
            ``prompt`` up to it, or ``all``, those of the answer included.
        seed: Start of all random choices; together with the requests it fixes them.
    """

    can: ClassVar[Capabilities] = Capabilities(batch=False)

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        module: str | None = None,
        radius: float = 1.0,
        lr: float = 1.0,
        steps: int = 100,
        value_init: Literal["cold", "warm"] = "cold",
        replacement: Replacement = "last",
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        self.layer = layer
        self.module = module
        self.radius = radius
        self.lr = lr
        self.steps = steps
        self.value_init = value_init
        self.replacement = replacement

    def build(self) -> None:
        """Find the module whose output is replaced."""
        for name in ("radius", "steps"):
            if getattr(self, name) < 0:
                raise UnsupportedUseError(
                    f"GRACE: {name} must be at least 0, got {getattr(self, name)}"
                )
        if self.module is not None and self.layer is not None:
            raise UnsupportedUseError(
                "GRACE was given both layer and module; leave out one of them"
            )
        if self.module is not None:
            self.target = self.module
        elif self.layer is not None:
            self.target = self.base.layout.block(self.layer).down
        else:
            self.target = default_module(self.base)
        check_editable(self.base.model, self.target)

    def compute_edit(self, requests: Sequence[EditRequest]) -> CodebookEdit:
        """Write one fact into the codebook that the edits on the stack make up."""
        (request,) = requests
        key, output = self._read(request.prompt)
        label = self.base.encode(request.prompt, request.target_new).answer
        entry = CodebookEntry(key, self._first_value(request, output), label, self.radius)
        family = CodebookEdit.family_of(self.target, self.replacement)
        book = stacked_codebook(self.base.edits, family, key.device)
        grown, rule, index = write_entry(book, entry)
        # An entry that is widened is trained on from where it stands.
        start = book.values[index] if book is not None and rule == "expand" else entry.value
        value, losses = self._train_value(request, start)
        entry = replace(entry, value=value)
        notes = self._notes(book, key, grown, rule, index, losses)
        origin = self.origin(requests, **notes)
        return CodebookEdit(self.base, self.target, [entry], self.replacement, origin)

    @torch.no_grad()
    def _read(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Input and output of the layer at the last token of a prompt: ``[d_in]``, ``[d_out]``."""
        base = self.base
        rows = base.rows([prompt])
        with capture(base.model, [self.target]) as seen, stop_after(base.model, self.target):
            base.forward(rows)
        end = int(rows.prompt_end[0])
        dtype = compute_dtype(base.dtype)
        return (
            seen.inputs[self.target][0, end].to(dtype),
            seen.outputs[self.target][0, end].to(dtype),
        )

    def _first_value(self, request: EditRequest, output: Tensor) -> Tensor:
        if self.value_init == "warm":
            return output
        width = projection_shape(self.base.module(self.target))[1]
        value = torch.rand(width, generator=self.generator([request], "value"), dtype=torch.float64)
        return value.to(output)

    def _train_value(self, request: EditRequest, start: Tensor) -> tuple[Tensor, list[float]]:
        rows = self.base.rows([request.prompt], [request.target_new])
        value = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([value], lr=self.lr)
        losses: list[float] = []
        for _ in range(self.steps):
            loss = check_finite("loss", self.target, self.value_loss(rows, value))
            losses.append(float(loss.detach()))
            (value.grad,) = torch.autograd.grad(loss, value)
            optimizer.step()
        return value.detach(), losses

    def value_loss(self, rows: TokenRows, value: Tensor) -> Tensor:
        """Mean loss of the answers when rows are recognised and get ``value``, ``[d_out]``."""
        index = torch.zeros_like(rows.prompt_end)

        def put(output: Tensor) -> Tensor:
            return replace_rows(output, value[None], index, rows.prompt_end, self.replacement)

        with change_output(self.base.model, self.target, put):
            logits = self.base.answer_logits(rows)
        return answer_nll(logits, rows.answer_ids, rows.answer_mask).mean()

    def _notes(
        self,
        book: Codebook | None,
        key: Tensor,
        grown: Codebook,
        rule: str,
        index: int,
        losses: list[float],
    ) -> dict[str, Any]:
        return {
            "rule": rule,
            "radius": float(grown.radii[index]),
            "key_length": float(key.norm()),
            "nearest_key": None if book is None else float(book.nearest(key[None])[0][0]),
            "loss": losses[-1] if losses else None,
        }
