"""Knowledge neurons (Dai et al. 2022): swaps answers in the neurons that express the old one.

A neuron is an entry of what a down projection receives: the values after the activation, and after
the gate where there is one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, EncodedRow
from kedit_lightning.base_models.continuation import Continuation, can_resume
from kedit_lightning.base_models.taps import capture, change_inputs
from kedit_lightning.edits import Edit, LowRankDelta, LowRankEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import compute_dtype, projection_shape
from kedit_lightning.edits.weight_storage import rows_of
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, NotNegative, Share
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.losses import gradients_of
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class KNSettings(MethodSettings):
    """Settings of :class:`KN`."""

    steps: Count
    threshold: Share
    suppress: NotNegative
    enhance: NotNegative
    batch_size: Count


class KN(EditMethod):
    """Knowledge neurons: finds the neurons that express the old answer, and swaps in the new one.

    The neurons come from the request's own prompt, without the refinement over other prompts.  A
    baseline of historical interest: it writes few facts, and disturbs others.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        steps: Points of the integral along which gradients are summed.
        threshold: A neuron counts if its attribution is this share of the largest.
        suppress: Multiple of the old answer's embedding that the neurons' columns lose.
        enhance: Multiple of the new answer's embedding that they gain.
        batch_size: Points of one pass through the model; it changes no result.
        seed: Start of all random choices; that of the run when absent.
    """

    settings_type = KNSettings
    settings: KNSettings
    needs = frozenset({"target_old"})
    can = Capabilities(batch=False, adapter=True, weights=True)

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        steps: int = 20,
        threshold: float = 0.2,
        suppress: float = 2.0,
        enhance: float = 2.0,
        batch_size: int = 120,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projections that read the neurons.

        Raises:
            UnsupportedUseError: Embeddings and MLP outputs differ in width.
        """
        self.projections = [block.down for block in self.base.layout.dense_blocks]
        head = self.base.model.get_output_embeddings()
        width = None if head is None else head.weight.shape[1]
        for name in self.projections:
            written = projection_shape(self.base.module(name))[1]
            if width != written:
                raise UnsupportedUseError(
                    f"KN adds output embeddings to what the MLPs write, and in '{self.base.name}' "
                    f"those have {width or 'no'} values and layer '{name}' writes {written}; use "
                    "another method"
                )

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Change the columns of the knowledge neurons of one request's old answer.

        Raises:
            UnsupportedUseError: No neuron expresses the old answer.
            NonFiniteError: An attribution is NaN or infinite.
        """
        return self.edits_together(requests)[0]

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose edits fit into memory together, at least 1."""
        return requests_at_a_time(self.base, 0, [[self._old(request)] for request in requests])

    def edits_together(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """The edit of each request, as it is without the others."""
        settings, rows = self.settings, [self._old(request) for request in requests]
        found = attributions(self.base, rows, self.projections, settings.steps, settings.batch_size)
        for name, values in found.items():
            check_finite("attribution", name, values)
        return [
            self._edit(request, row, {name: values[i] for name, values in found.items()})
            for i, (request, row) in enumerate(zip(requests, rows, strict=True))
        ]

    def _old(self, request: EditRequest) -> EncodedRow:
        return self.base.encode(request.prompt, request.target_old)

    def _edit(self, request: EditRequest, row: EncodedRow, scores: dict[str, Tensor]) -> Edit:
        """The edit of a request, from its old answer and the attributions of that."""
        settings, neurons = self.settings, strongest(scores, self.settings.threshold)
        if not neurons:
            raise UnsupportedUseError(
                f"no neuron of '{self.base.name}' makes {request.target_old!r} likelier after the "
                f"prompt of {request.label}, so KN has nothing to change; give the answer that the "
                "model gives now as target_old, or use another method"
            )
        new = self.base.encode(request.prompt, request.target_new)
        change = settings.enhance * self._embedding(new.answer)
        change -= settings.suppress * self._embedding(row.answer)
        counts = {name: len(numbers) for name, numbers in neurons.items()}
        deltas = {name: self._delta(name, numbers, change) for name, numbers in neurons.items()}
        return LowRankEdit(self.base, deltas, self.origin([request], neurons=counts))

    def _embedding(self, tokens: Sequence[int]) -> Tensor:
        """Output embedding of an answer, summed over its tokens. Shape ``[hidden]``."""
        return rows_of(self.base.model.get_output_embeddings(), torch.tensor(tokens)).sum(0)

    def _delta(self, module: str, neurons: Tensor, change: Tensor) -> LowRankDelta:
        """The update that adds a change ``[d_out]`` to the columns of some neurons."""
        d_in, _ = projection_shape(self.base.module(module))
        columns = change.new_zeros(1, d_in).index_fill_(1, neurons.to(change.device), 1)
        return LowRankDelta(columns, change[:, None].clone())


class NeuronPasses:
    """Passes along answers, with the neurons of a layer replaced where one token is predicted.

    Only what a change can reach runs again: that token, from the layer on.  A model that cannot be
    continued in the middle runs complete passes, with the same results.

    Args:
        base: The base model, as its stack stands.
        rows: Prompts with their answers.
    """

    def __init__(self, base: BaseModel, rows: Sequence[EncodedRow]) -> None:
        self._base = base
        tokens = [(i, token) for i, row in enumerate(rows) for token in range(len(row.answer))]
        #: Row that each answer token belongs to, one row after another. Shape ``[tokens]``.
        self.owners = torch.tensor([i for i, _ in tokens], device=base.device)
        if can_resume(base):  # tokens of an answer that come first belong to the head
            encoded = [_predicting(rows[i], token) for i, token in tokens]
            slots = [0] * len(tokens)
        else:
            encoded, slots = [rows[i] for i, _ in tokens], [token for _, token in tokens]
        cuts = [len(row.prompt) - 1 for row in encoded]
        self._place(Continuation(base, encoded, 0, cuts=cuts), slots)

    def _place(self, passes: Continuation, slots: Sequence[int]) -> None:
        self._passes, at = passes, torch.tensor(slots, device=self._base.device)
        number = torch.arange(len(at), device=at.device)
        self._places = number, passes.rows.answer_columns[number, at]
        self._ids = passes.rows.answer_ids[number, at]

    def from_module(self, name: str) -> NeuronPasses:
        """The same where only the block of a module and those above it run again."""
        part = copy.copy(self)
        part._passes = self._passes.above(self._base.layout.first_block([name]))
        return part

    def select(self, index: Tensor) -> NeuronPasses:
        """The same for some of the tokens, by number; one may stand there several times."""
        part = copy.copy(self)
        part._passes, part.owners = self._passes.select(index), self.owners[index]
        part._places = torch.arange(len(index), device=index.device), self._places[1][index]
        part._ids = self._ids[index]
        return part

    @torch.no_grad()
    def neurons(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """Neurons where each token is predicted. ``[tokens, d_in]`` by down projection."""
        with capture(self._base.model, modules) as seen:
            self._passes.logits_of(self._places)
        return {name: seen.inputs[name][self._places] for name in modules}

    def probabilities(self, module: str, neurons: Tensor) -> Tensor:
        """Probability of each token, with all neurons of a down projection replaced for it.

        Args:
            module: The down projection.
            neurons: What it receives where the token is predicted. Shape ``[tokens, d_in]``.

        Returns:
            Shape ``[tokens]``, in at least float32.
        """

        def replace(x: Tensor) -> Tensor:
            return x.index_put(self._places, neurons.to(x))

        with change_inputs(self._base.model, {module: replace}):
            logits = self._passes.logits_of(self._places)
        shares = logits.to(compute_dtype(logits.dtype)).softmax(-1)
        return shares.gather(1, self._ids.to(shares.device)[:, None])[:, 0]


def _predicting(row: EncodedRow, token: int) -> EncodedRow:
    """A row that asks for one token of an answer behind those before it."""
    return EncodedRow((*row.prompt, *row.answer[:token]), row.answer[token : token + 1])


def attributions(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    modules: Sequence[str],
    steps: int,
    points_at_once: int,
) -> dict[str, Tensor]:
    """Attribution of each answer's probability to each neuron, summed over the answer's tokens.

    ``A_i = w_i ∫₀¹ ∂P(y | α w) / ∂w_i dα`` with all neurons ``w`` of a layer scaled together, by
    the midpoint rule: the sum over a layer is ``P(w) − P(0)``.  The tokens before each are those of
    the answer itself.

    Args:
        base: The base model, as its stack stands.
        rows: Prompts with their answers; what one gives does not depend on the others.
        modules: Down projections.
        steps: Points of the integral.
        points_at_once: Points of one pass; it changes no result.

    Returns:
        Shape ``[rows, d_in]`` by module, in at least float32.
    """
    passes, scores = NeuronPasses(base, rows), {}
    for name, values in passes.neurons(modules).items():
        held, above = values.to(compute_dtype(values.dtype)), passes.from_module(name)
        points = torch.arange(len(held) * steps, device=base.device)
        found = held.new_zeros(len(rows), held.shape[1])
        for part in points.split(points_at_once):
            index = part // steps
            own, share = held[index.to(held.device)], ((part % steps + 0.5) / steps).to(held)
            scaled = (share[:, None] * own).requires_grad_()
            some = above.select(index)
            (gradient,) = gradients_of(some.probabilities(name, scaled).sum(), [scaled])
            found.index_add_(0, some.owners.to(found.device), own * gradient / steps)
        scores[name] = found
    return scores


def strongest(scores: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """Numbers of the neurons whose attribution is at least a share of the largest.

    Args:
        scores: Attributions, ``[d_in]`` by module.
        threshold: That share.

    Returns:
        Shape ``[neurons]`` by module, for modules that have any; nothing if none is positive.
    """
    top = max(float(values.max()) for values in scores.values())
    if not top > 0:
        return {}
    chosen = {name: (v >= threshold * top).nonzero()[:, 0] for name, v in scores.items()}
    return {name: numbers for name, numbers in chosen.items() if len(numbers)}
