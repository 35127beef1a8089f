"""GRACE: a codebook of keys and values beside one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, TokenRows
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.taps import capture, change_output, stop_after
from kedit_lightning.edits import CodebookEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.codebook.codebook import (
    CodebookEntry,
    Replacement,
    replace_rows,
    write_entry,
)
from kedit_lightning.edits.kinds.codebook.codebook_edit import stacked_codebook
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.rounding import state_rounding
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import CountOrZero, NotNegative, Positive
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.losses import answer_nll
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

ValueInit: TypeAlias = Literal["cold", "warm"]

#: Depth, as a share of the blocks, of the codebook in models without published settings.
USUAL_DEPTH = 0.75


class CodebookPlace(NamedTuple):
    """The block with the codebook, and the index of the projection among those of its MLP."""

    layer: int
    projection: int = -1


@dataclass(frozen=True)
class GRACESettings(MethodSettings):
    """Settings of :class:`GRACE`; ``layer`` and ``module`` once it is built."""

    layer: int | None
    module: str | None
    radius: NotNegative
    lr: Positive
    steps: CountOrZero
    value_init: ValueInit
    replacement: Replacement


class GRACE(EditMethod):
    """Keeps a codebook beside a layer: for each fact a key and a value that gives the new answer.

    The key is the layer's input at the last prompt token, the value replaces the layer's output.
    A prompt gets the value of the nearest key if it lies within that key's radius; all other
    prompts pass bit for bit. Rephrased prompts are rarely within it: reliability and locality are
    high and generalisation is low, as published. Only the value of the new fact is trained. A new
    answer to a prompt that has one replaces it; the paper's rule leaves neither in reach.
    Paper: https://arxiv.org/abs/2211.11031.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layer: Block whose down projection gets the codebook, negative numbers from the end. When
            absent the published one of a known model, or else one in the upper third.
        module: Name of the module instead, such as ``transformer.h.35.mlp.c_fc``.
        radius: Initial radius of a new entry. Norms of keys differ by model and layer: an edit
            records the norm of its key and the distance to the nearest other key.
        lr: Learning rate of Adam on the value.
        steps: Steps of Adam on the value.
        value_init: ``cold`` starts from random numbers between 0 and 1, ``warm`` from the layer's
            own output.
        replacement: Tokens of a recognised prompt that get the value: the ``last`` one, the whole
            ``prompt``, or ``all``, those of the answer included.
        seed: Seed of the random start of the value, which depends on the request too.
    """

    can: ClassVar[Capabilities] = Capabilities(batch=False)
    settings_type: ClassVar[type[MethodSettings]] = GRACESettings
    settings: GRACESettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layer: int | None = None,
        module: str | None = None,
        radius: float = 1.0,
        lr: float = 1.0,
        steps: int = 100,
        value_init: ValueInit = "cold",
        replacement: Replacement = "last",
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the module whose output is replaced.

        Raises:
            UnsupportedUseError: Both layer and module are given, or the module cannot be edited.
            ModuleNotLocatedError: The block does not exist or has no dense MLP.
        """
        settings = self.settings
        layer, module = settings.layer, settings.module
        if module is not None and layer is not None:
            raise UnsupportedUseError("GRACE got both layer and module; leave out one of them")
        if module is None:
            layer, projection = default_place(self.base) if layer is None else (layer, -1)
            module = self.base.layout.block(layer).projections[projection]
        check_editable(self.base.model, module)
        self.settings = replace(settings, layer=layer, module=module)

    @property
    def module_name(self) -> str:
        """Name of the module with the codebook."""
        assert self.settings.module is not None  # resolved by build()
        return self.settings.module

    def compute_edit(self, requests: Sequence[EditRequest]) -> CodebookEdit:
        """Write one fact into the codebook that the edits on the stack make up."""
        (request,), settings = requests, self.settings
        key, output = self._key_and_output(request.prompt)
        label = self.base.encode(request.prompt, request.target_new).answer
        entry = CodebookEntry(key, self._initial_value(request, output), label, settings.radius)
        family = CodebookEdit.family_of(self.module_name, settings.replacement)
        codebook = stacked_codebook(self.base, family, key.device)
        rounding = state_rounding(self.base.dtype)
        grown, rule, index = write_entry(codebook, entry, rounding)
        # An entry that is expanded is trained on from its present value.
        start = codebook.values[index] if codebook and rule == "expand" else entry.value
        value, losses = self._train_value(request, start)
        origin = self.origin(
            requests,
            rule=rule,
            radius=float(grown.radii[index]),
            key_length=float(key.norm()),
            nearest_key=float(codebook.nearest(key[None])[0][0]) if codebook else None,
            loss=losses[-1] if losses else None,
        )
        entries = [replace(entry, value=value)]
        return CodebookEdit(self.base, self.module_name, entries, settings.replacement, origin)

    @torch.no_grad()
    def _key_and_output(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Input and output of the layer at the last prompt token: ``[d_in]``, ``[d_out]``."""
        base, module = self.base, self.module_name
        rows = base.rows([prompt])
        with capture(base.model, [module]) as states, stop_after(base.model, module):
            base.forward(rows)
        end, dtype = int(rows.prompt_end[0]), compute_dtype(base.dtype)
        return states.inputs[module][0, end].to(dtype), states.outputs[module][0, end].to(dtype)

    def _initial_value(self, request: EditRequest, output: Tensor) -> Tensor:
        if self.settings.value_init == "warm":
            return output
        width = projection_shape(self.base.module(self.module_name))[1]
        value = torch.rand(width, generator=self.generator([request], "value"), dtype=torch.float64)
        return value.to(output)

    def _train_value(self, request: EditRequest, start: Tensor) -> tuple[Tensor, list[float]]:
        rows = self.base.rows([request.prompt], [request.target_new])
        value = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([value], lr=self.settings.lr)
        losses: list[float] = []
        for _ in range(self.settings.steps):
            loss = check_finite("loss", self.module_name, self.value_loss(rows, value))
            losses.append(float(loss.detach()))
            (value.grad,) = torch.autograd.grad(loss, value)
            optimizer.step()
        return value.detach(), losses

    def value_loss(self, rows: TokenRows, value: Tensor) -> Tensor:
        """Mean negative log-likelihood of the answers if every row gets a value ``[d_out]``."""
        index, replacement = torch.zeros_like(rows.prompt_end), self.settings.replacement

        def put(output: Tensor) -> Tensor:
            return replace_rows(output, value[None], index, rows.prompt_end, replacement)

        with change_output(self.base.model, self.module_name, put):
            logits = self.base.answer_logits(rows)
        return answer_nll(logits, rows.answer_ids, rows.answer_mask).mean()


def default_place(base: BaseModel) -> CodebookPlace:
    """The published place of a known model, else one in the upper third."""
    blocks = len(base.layout)
    # At least one block must follow, or the later answer tokens could not attend to the value.
    known = published_settings(base, "GRACE", CodebookPlace)
    if known is not None:
        return known
    dense = base.layout.dense_layers
    followed = [layer for layer in dense if layer < blocks - 1] or dense
    return CodebookPlace(*nearest_layers(followed, [round(USUAL_DEPTH * blocks)]))
