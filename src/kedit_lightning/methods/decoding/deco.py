"""DeCo: decoding with dynamic correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.kinds.decoding.early_exit_edit import DeCoEdit, DeCoPlan
from kedit_lightning.methods.capabilities import Bounds, Count
from kedit_lightning.methods.decoding.shared.decoding_method import DecodingMethod
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditRequest

#: The published layers 20 to 28 of 32, as shares of a model's depth.
_FROM, _TO = 20 / 32, 28 / 32


@dataclass(frozen=True)
class DeCoSettings(MethodSettings):
    """Settings of :class:`DeCo`."""

    layers: list[int] | None
    alpha: Annotated[float, Bounds(0)]
    top_p: Annotated[float, Bounds(0, 1)]
    top_k: Count


class DeCo(DecodingMethod):
    """Corrects the last layer by the one before it that is surest of a likely token.

    The right token is often likelier in a preceding layer than in the last. Candidates are the
    likeliest tokens of the last layer; among preceding layers the one with the highest probability
    of a candidate, ``p_A``, adds its logits: ``l_N + alpha p_A l_A``. Nothing is trained, and no
    fact is written: the edit changes every answer. Made for pictures, it acts on any decoder.
    https://arxiv.org/abs/2410.11779

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Numbers of the preceding layers, of which k is the output of the k-th block; from
            62 to 88 % of the model's depth if not given, which is 20 to 28 of 32.
        alpha: Weight of the correction.
        top_p: Candidates are the likeliest tokens whose probabilities sum to this at most.
        top_k: Largest number of candidates.
        seed: Seed of all random choices; there are none.
    """

    settings_type: ClassVar[type[MethodSettings]] = DeCoSettings
    settings: DeCoSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        alpha: float = 0.6,
        top_p: float = 0.9,
        top_k: int = 20,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def compute_edit(self, requests: Sequence[EditRequest]) -> DeCoEdit:
        """The edit.

        Raises:
            UnsupportedUseError: The base model has no such layers.
        """
        settings, layers = self.settings, self.settings.layers
        if layers is None:
            layers = preceding_layers(len(self.base.layout))
        exits = self.exits(layers, norm=True)
        plan = DeCoPlan(exits, settings.alpha, settings.top_p, settings.top_k)
        return DeCoEdit(self.base, plan, self.origin(requests, layers=layers))


def preceding_layers(depth: int) -> list[int]:
    """The published layers, scaled to a model's depth; the last layer is never one.

    >>> preceding_layers(32) == list(range(20, 29))
    True
    >>> preceding_layers(6)
    [4, 5]
    """
    first, last = (min(round(share * depth), depth - 1) for share in (_FROM, _TO))
    return list(range(first, last + 1))
