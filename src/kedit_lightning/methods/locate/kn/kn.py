"""Knowledge neurons (Dai et al. 2022): swaps answers in the neurons that express the old one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import Edit, LowRankDelta, LowRankEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.projections import compute_dtype, projection_shape
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.locate.kn.knowledge_neurons import attributions, strongest
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class KNSettings(MethodSettings):
    """Settings of :class:`KN`."""

    steps: int
    threshold: float
    suppress: float
    enhance: float
    batch_size: int


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
        seed: Start of all random choices.
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
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projections that read the neurons.

        Raises:
            UnsupportedUseError: Embeddings and MLP outputs differ in width.
        """
        self.projections = [block.down for block in self.base.layout.blocks]
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
        weight: Tensor = self.base.model.get_output_embeddings().weight
        at = torch.tensor(tokens, device=weight.device)
        return weight[at].detach().to(compute_dtype(weight.dtype)).sum(0)

    def _delta(self, module: str, neurons: Tensor, change: Tensor) -> LowRankDelta:
        """The update that adds a change ``[d_out]`` to the columns of some neurons."""
        d_in, _ = projection_shape(self.base.module(module))
        columns = torch.nn.functional.one_hot(neurons, d_in).to(change)
        return LowRankDelta(columns, change[:, None].expand(-1, len(neurons)).contiguous())
