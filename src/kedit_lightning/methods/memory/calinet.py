"""CaliNet: calibration slots beside the last MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits import NeuronsEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.neurons.neurons import Neurons
from kedit_lightning.edits.kinds.neurons.neurons_edit import stacked_queries
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.methods.capabilities import Count, CountOrZero, NotNegative, Positive
from kedit_lightning.methods.memory.shared.background import Background
from kedit_lightning.methods.memory.shared.last_block import LastBlockPasses, last_mlp
from kedit_lightning.methods.memory.shared.query_memory import irrelevant_queries
from kedit_lightning.methods.method import EditMethod, MethodSettings
from kedit_lightning.requests import EditRequest


@dataclass(frozen=True)
class CaliNetSettings(MethodSettings):
    """Settings of :class:`CaliNet`."""

    slots: Count
    lr: Positive
    steps: CountOrZero
    silence_weight: NotNegative
    margin: NotNegative
    irrelevant: CountOrZero
    background: str | None


class CaliNet(EditMethod):
    """Adds calibration slots to the last MLP and trains them on all facts of an edit together.

    The slots are a small MLP of two layers, ``relu(x Kᵀ + b) V``, whose output is added to that of
    the last one. Trained is the likelihood of the answers; for facts in several wordings, give each
    wording as a request of its own, as the paper does. Slots trained on facts alone fire on every
    prompt, so here they have biases, and a second loss keeps them silent on prompts that the facts
    have nothing to do with and on the facts of earlier edits; the paper has neither. Where no slot
    fires nothing is added, to the last bit. Paper: https://arxiv.org/abs/2210.03329.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        slots: Number of slots of an edit; the released code has 64 for 100 facts.
        lr: Learning rate of Adam; the released code takes Adafactor at 0.01.
        steps: Steps of Adam, each over all facts of the edit.
        silence_weight: Weight of the loss that keeps slots silent.
        margin: Distance that silent slots keep from firing; a slot's first scores are near 1.
        irrelevant: Prompts for each request that it has nothing to do with.
        background: File of such prompts, one a line, in place of the usual ones, which are the
            request's own about subjects that the model names and openings of texts.
        seed: Seed of the first keys and of the irrelevant prompts; both depend on the requests
            too.
    """

    settings_type: ClassVar[type[MethodSettings]] = CaliNetSettings
    settings: CaliNetSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        slots: int = 64,
        lr: float = 2e-2,
        steps: int = 200,
        silence_weight: float = 1.0,
        margin: float = 10.0,
        irrelevant: int = 32,
        background: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the last MLP.

        Raises:
            UnsupportedUseError: It cannot be edited.
            ModuleNotLocatedError: No block has a dense MLP of its own.
        """
        self.place = last_mlp(self.base)
        self._background = Background(self.base, self.settings.start, self.settings.background)

    def compute_edit(self, requests: Sequence[EditRequest]) -> NeuronsEdit:
        """Train the slots of the requests."""
        base, place = self.base, self.place
        passes = LastBlockPasses(base, place, requests)
        irrelevant = self._background.of(requests, self.settings.irrelevant)
        foreign, _ = irrelevant_queries(base, place.reads, requests, irrelevant)
        silent = torch.cat([foreign, *stacked_queries(base, place)])
        slots, loss = self._train(passes, silent, self._first_slots(requests, passes.queries))
        return NeuronsEdit(base, {place: slots}, self.origin(requests, loss=loss))

    def _first_slots(self, requests: Sequence[EditRequest], queries: Tensor) -> Neurons:
        """Slots of random keys that add nothing yet, since their values are zero.

        Args:
            requests: The requests, which the keys depend on.
            queries: Inputs of the MLP at the tokens of their answers. Shape ``[n, d_in]``.
        """
        count, generator = self.settings.slots, self.generator(requests, "slots")
        d_out = projection_shape(self.base.module(self.place.writes))[1]
        keys = torch.randn(count, queries.shape[1], generator=generator, dtype=torch.float64)
        length = queries.norm(dim=1).mean().clamp(min=1e-12)
        values = queries.new_zeros(count, d_out)
        return Neurons(keys.to(queries) / length, queries.new_zeros(count), values, queries)

    def _train(
        self, passes: LastBlockPasses, silent: Tensor, slots: Neurons
    ) -> tuple[Neurons, float]:
        """Slots after training, and the loss of the answers.

        Args:
            passes: Passes through the last block at the tokens of the answers.
            silent: Inputs of the MLP on which slots shall be silent. Shape ``[m, d_in]``.
            slots: The slots to start from.
        """
        settings, module = self.settings, self.place.writes
        keys, biases, values = (leaf.clone().requires_grad_() for leaf in slots.tensors[:3])
        leaves, queries = [keys, biases, values], slots.queries
        slots = Neurons(keys, biases, values, queries)
        tokens = passes.row.bincount()
        # Each request counts alike, however long its answer is.
        shares = 1 / (tokens[passes.row] * len(tokens)).to(queries)
        optimizer, answers = torch.optim.Adam(leaves, lr=settings.lr), 0.0
        for step in range(settings.steps + 1):
            change = slots.change(slots.activations(queries))
            logs = passes.run(change).to(queries.dtype).log_softmax(-1)
            nll = -(logs.gather(-1, passes.targets[:, None])[:, 0] * shares).sum()
            loss = nll + settings.silence_weight * silence_loss(slots, silent, settings.margin)
            check_finite("loss of slots", module, loss)
            answers = float(nll.detach())
            if step == settings.steps:
                break
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.grad = gradient
            optimizer.step()
        return Neurons(keys.detach(), biases.detach(), values.detach(), queries), answers


def silence_loss(slots: Neurons, silent: Tensor, margin: float) -> Tensor:
    """Mean length of what slots would add if they fired ``margin`` earlier, a scalar.

    Args:
        slots: The slots.
        silent: Inputs of the MLP. Shape ``[m, d_in]``.
        margin: How much is added to each score.
    """
    if not len(silent):
        return silent.new_zeros(())
    earlier = Neurons(slots.keys, slots.biases + margin, slots.values, slots.queries)
    lengths: Tensor = earlier.change(earlier.activations(silent)).norm(dim=1)
    return lengths.mean()
