"""Knowledge neurons (Dai et al. 2022): swaps answers in the neurons that express the old one.

A neuron is an entry of what a down projection receives: the values after the activation, and after
the gate where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, EncodedRow
from kedit_lightning.base_models.taps import capture, change_inputs
from kedit_lightning.edits import Edit, LowRankDelta, LowRankEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import compute_dtype, projection_shape
from kedit_lightning.edits.weight_storage import rows_of
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, NotNegative, Share
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.losses import gradients_of
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
        (request,), settings = requests, self.settings
        row = self.base.encode(request.prompt, request.target_old)
        scores = attributions(self.base, row, self.projections, settings.steps, settings.batch_size)
        for name, values in scores.items():
            check_finite("attribution", name, values)
        neurons = strongest(scores, settings.threshold)
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
        return LowRankEdit(self.base, deltas, self.origin(requests, neurons=counts))

    def _embedding(self, tokens: Sequence[int]) -> Tensor:
        """Output embedding of an answer, summed over its tokens. Shape ``[hidden]``."""
        return rows_of(self.base.model.get_output_embeddings(), torch.tensor(tokens)).sum(0)

    def _delta(self, module: str, neurons: Tensor, change: Tensor) -> LowRankDelta:
        """The update that adds a change ``[d_out]`` to the columns of some neurons."""
        d_in, _ = projection_shape(self.base.module(module))
        columns = torch.nn.functional.one_hot(neurons, d_in).to(change)
        return LowRankDelta(columns, change[:, None].expand(-1, len(neurons)).contiguous())


@torch.no_grad()
def read_neurons(base: BaseModel, row: EncodedRow, modules: Sequence[str]) -> dict[str, Tensor]:
    """Neurons where a row's answer tokens are predicted. ``[answer tokens, d_in]`` by module."""
    rows = base.pad([row])
    with capture(base.model, modules) as seen:
        base.forward(rows)
    return {name: seen.inputs[name][0, rows.answer_columns[0]] for name in modules}


def probabilities(
    base: BaseModel, row: EncodedRow, token: int, patches: Sequence[tuple[str, Tensor]]
) -> Tensor:
    """Probability of one token of a row's answer, with the neurons of one layer replaced.

    All of the layer's neurons are replaced, at the column that predicts the token and nowhere else.

    Args:
        base: The base model, as its stack stands.
        row: A prompt with its answer.
        token: Number of the answer's token.
        patches: A module and what it is to receive, ``[d_in]``, for each run of the model.

    Returns:
        One probability a patch, in at least float32. Shape ``[patches]``.
    """
    rows = base.pad([row] * len(patches))
    column = int(rows.answer_columns[0, token])

    def replace(name: str, x: Tensor) -> Tensor:
        x, numbers = x.clone(), [i for i, (patched, _) in enumerate(patches) if patched == name]
        at = torch.tensor(numbers, device=x.device)
        x[at, column] = torch.stack([patches[number][1] for number in numbers]).to(x)
        return x

    with change_inputs(base.model, {name: partial(replace, name) for name, _ in patches}):
        logits = base.logits_at(rows, rows.answer_columns[:, token : token + 1])[:, 0]
    chosen = rows.answer_ids[:, token]
    shares = logits.to(compute_dtype(logits.dtype)).softmax(-1)
    return shares.gather(1, chosen[:, None])[:, 0]


def attributions(
    base: BaseModel, row: EncodedRow, modules: Sequence[str], steps: int, rows_at_once: int
) -> dict[str, Tensor]:
    """Attribution of the answer's probability to each neuron, summed over the answer's tokens.

    ``A_i = w_i ∫₀¹ ∂P(y | α w) / ∂w_i dα`` with all neurons ``w`` of a layer scaled together, by
    the midpoint rule: the sum over a layer is ``P(w) − P(0)``.  The tokens before each are those of
    the answer itself.

    Args:
        base: The base model, as its stack stands.
        row: A prompt with the answer.
        modules: Down projections.
        steps: Points of the integral.
        rows_at_once: Runs of the model in one pass; it changes no result.

    Returns:
        Shape ``[d_in]`` by module, in at least float32.
    """
    neurons = {
        name: values.to(compute_dtype(values.dtype))
        for name, values in read_neurons(base, row, modules).items()
    }
    scores = {name: torch.zeros_like(values[0]) for name, values in neurons.items()}
    runs = [(name, (step + 0.5) / steps) for name in modules for step in range(steps)]
    for token in range(len(row.answer)):
        for start in range(0, len(runs), rows_at_once):
            some = runs[start : start + rows_at_once]
            scaled = [(n, (at * neurons[n][token]).requires_grad_(True)) for n, at in some]
            total = probabilities(base, row, token, scaled).sum()
            gradients = gradients_of(total, [vector for _, vector in scaled])
            for (name, _), gradient in zip(some, gradients, strict=True):
                scores[name] += neurons[name][token] * gradient / steps
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
