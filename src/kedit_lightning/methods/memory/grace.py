"""GRACE: a codebook of keys and values beside one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.taps import capture, change_output, stop_after
from kedit_lightning.contradictions import settle
from kedit_lightning.edits import CodebookEdit, Edit
from kedit_lightning.edits.effects import RouteRows
from kedit_lightning.edits.kinds.codebook.codebook import (
    CodebookEntry,
    Replacement,
    placement,
    replace_rows,
)
from kedit_lightning.edits.kinds.codebook.codebook_edit import stacked_codebook
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import CountOrZero, NotNegative, Positive
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses, Reach, encoded_answers
from kedit_lightning.methods.shared.inner_loop import InnerLoop, adam
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
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


class _Place(NamedTuple):
    """Where the value of a new entry is trained, and what the rules did."""

    entry: CodebookEntry
    start: Tensor | None  # the value it goes on from, ``[d_out]``; ``None`` for a fresh one
    notes: dict[str, Any]


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

    can: ClassVar[Capabilities] = Capabilities(batch=False, images=True)
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
        #: Values of requests that are about to be written, with their losses.
        self._ahead: dict[EditRequest, tuple[Tensor, list[float]]] = {}

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

    # ---- one fact after another

    def noted_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """The edit of some facts; their values do not hang on each other, so they train first."""
        requests = settle(requests, "last")
        if len(requests) > 1 and self.settings.value_init == "cold":
            with self.computing(requests):
                self._ahead = dict(zip(requests, self._values(requests), strict=True))
        try:
            return super().noted_edit(requests)
        finally:
            if len(requests) > 1:  # it is that of the whole
                self._ahead = {}

    def compute_edit(self, requests: Sequence[EditRequest]) -> CodebookEdit:
        """Write one fact into the codebook that the edits on the stack make up."""
        return self.edits_together(requests)[0]

    # ---- facts apart from each other

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose values are trained together, at least 1."""
        encoded = [[row] for row in encoded_answers(self.base, requests)]
        block = self.base.layout.first_block([self.module_name])
        return requests_at_a_time(self.base, block, encoded)

    def edits_together(self, requests: Sequence[EditRequest]) -> list[CodebookEdit]:
        """The edit of each request on the stack as it stands, without the others."""
        places = [self._place(request) for request in requests]
        pairs = list(zip(requests, places, strict=True))
        ahead = [None if place.start is not None else self._ahead.get(r) for r, place in pairs]
        missing = [pair for pair, known in zip(pairs, ahead, strict=True) if known is None]
        trained = iter(self._values([r for r, _ in missing], [place.start for _, place in missing]))
        return [
            self._edit(request, place, *(known or next(trained)))
            for (request, place), known in zip(pairs, ahead, strict=True)
        ]

    def _place(self, request: EditRequest) -> _Place:
        """Where the codebook of the stack takes a new entry, with a value to be trained."""
        key, output = self._key_and_output(request)
        row = self.base.encode(request.prompt, request.target_new, image=request.image)
        entry = CodebookEntry(key, output, row.answer, self.settings.radius)
        codebook = stacked_codebook(self.base, self._family, key.device)
        placed = placement(codebook, entry)
        notes = {
            "rule": placed.rule,
            "radius": float(placed.radii[placed.index]),
            "key_length": float(key.norm()),
            "nearest_key": float(codebook.nearest(key[None])[0][0]) if codebook else None,
        }
        start = output if self.settings.value_init == "warm" else None
        if codebook and placed.rule == "expand":  # trained on from its present value
            start = codebook.values[placed.index]
        return _Place(entry, start, notes)

    def _edit(
        self, request: EditRequest, place: _Place, value: Tensor, losses: Sequence[float]
    ) -> CodebookEdit:
        origin = self.origin([request], **place.notes, loss=losses[-1] if losses else None)
        entries = [replace(place.entry, value=value)]
        where = self.settings.replacement
        return CodebookEdit(self.base, self.module_name, entries, where, origin)

    @property
    def _family(self) -> tuple[str, str, str]:
        return CodebookEdit.family_of(self.module_name, self.settings.replacement)

    # ---- keys and values

    @torch.no_grad()
    def _key_and_output(self, request: EditRequest) -> tuple[Tensor, Tensor]:
        """Input and output of the layer at the last prompt token: ``[d_in]``, ``[d_out]``."""
        base, module = self.base, self.module_name
        rows = base.rows([request.prompt], images=[request.image])
        with capture(base.model, [module]) as states, stop_after(base.model, module):
            base.forward(rows)
        end, dtype = int(rows.prompt_end[0]), compute_dtype(base.dtype)
        return states.inputs[module][0, end].to(dtype), states.outputs[module][0, end].to(dtype)

    def _cold_value(self, request: EditRequest) -> Tensor:
        """Random numbers to start from. Shape ``[d_out]``."""
        width = projection_shape(self.base.module(self.module_name))[1]
        value = torch.rand(width, generator=self.generator([request], "value"), dtype=torch.float64)
        return value.to(self.base.device, compute_dtype(self.base.dtype))

    def _values(
        self, requests: Sequence[EditRequest], starts: Sequence[Tensor | None] | None = None
    ) -> list[tuple[Tensor, list[float]]]:
        """Train the value of each request; gives it with its losses.

        The codebook of the stack replaces the same outputs, so it is left out: then nothing but
        the blocks above has to run.
        """
        found: list[tuple[Tensor, list[float]]] = []
        reach: Reach = "prompt_end" if self.settings.replacement == "last" else "all"
        loop = InnerLoop(adam(self.settings.lr), self.settings.steps, where=self.module_name)
        size = self.together(requests) if requests else 1
        for first in range(0, len(requests), size):
            part = slice(first, first + size)
            given = [None] * len(requests[part]) if starts is None else starts[part]
            start = [
                self._cold_value(request) if own is None else own
                for request, own in zip(requests[part], given, strict=True)
            ]
            with self._without_codebook():
                passes = AnswerPasses.of(self.base, requests[part], [self.module_name], reach)
                results = loop.run(passes, [torch.stack(start)], self.value_losses)
            found += zip(results.tensors[0].unbind(), results.losses, strict=True)
        return [(value.clone(), losses) for value, losses in found]

    def value_losses(self, passes: AnswerPasses, values: Sequence[Tensor]) -> Tensor:
        """Mean negative log-likelihood of each row's answer under its value. Shape ``[batch]``.

        Args:
            passes: The rows.
            values: One tensor with the value of each row. Shape ``[batch, d_out]``.
        """
        index = torch.arange(len(passes), device=values[0].device)

        def put(output: Tensor) -> Tensor:
            end = passes.rows.prompt_end
            return replace_rows(output, values[0], index, end, self.settings.replacement)

        with change_output(self.base.model, self.module_name, put):
            return passes.losses()

    @contextmanager
    def _without_codebook(self) -> Iterator[None]:
        """Inside, edits that only write into this codebook are not on the stack."""
        with self.base.edits.restored():
            for edit in reversed(list(self.base.edits)):
                effects = [effect for part in edit.parts() for effect in part.effects()]
                routes = [effect for effect in effects if isinstance(effect, RouteRows)]
                if len(routes) == len(effects) and {r.family for r in routes} == {self._family}:
                    edit.rollback()
            yield


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
