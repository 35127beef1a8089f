"""DoLa: decoding by contrasting layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.kinds.decoding.early_exit_edit import DoLaEdit, DoLaPlan
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Bounds
from kedit_lightning.methods.decoding.shared.decoding_method import DecodingMethod
from kedit_lightning.methods.method import MethodSettings
from kedit_lightning.requests import EditRequest

#: A range of layers by its place in the model.
Bucket: TypeAlias = Literal["low", "high"]
#: Deeper models take as many layers of a bucket as one of this depth.
_DEEP = 40


@dataclass(frozen=True)
class DoLaSettings(MethodSettings):
    """Settings of :class:`DoLa`."""

    layers: Bucket | list[int]
    relative_top: Annotated[float, Bounds(0, 1, above=True)]
    early_exit_norm: bool
    legacy_divergence: bool


class DoLa(DecodingMethod):
    """Prefers tokens that the last layer makes likelier than an earlier one does.

    What a model knows about facts comes in at its later layers. At each token the layer of a bucket
    is chosen whose distribution is furthest from the last one's (Jensen-Shannon), and tokens are
    scored by ``log q_N - log q_M`` among those that the last layer finds plausible. Nothing is
    trained, and no fact is written: the edit changes every answer. One layer alone in ``layers`` is
    the static form. https://arxiv.org/abs/2309.03883

    The released code penalises repetition by 1.2 as well; pass ``repetition_penalty`` to
    ``generate`` for that.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Candidate layers: ``high``, every second one of the upper half, for short answers
            such as TruthfulQA's; ``low``, of the lower half, for reasoning in steps; or their
            numbers, of which 0 is the embedding and k the output of the k-th block.
        relative_top: Tokens less likely than this share of the likeliest one are excluded (α).
        early_exit_norm: Send early hidden states through the final norm, which the released code
            does not.
        legacy_divergence: Choose the layer by the divergence of the released code, in which the
            sides of KL are exchanged.
        seed: Seed of all random choices; there are none.
    """

    settings_type: ClassVar[type[MethodSettings]] = DoLaSettings
    settings: DoLaSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: Bucket | list[int] = "high",
        relative_top: float = 0.1,
        early_exit_norm: bool = False,
        legacy_divergence: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def compute_edit(self, requests: Sequence[EditRequest]) -> DoLaEdit:
        """The edit.

        Raises:
            UnsupportedUseError: The base model has no such layers.
        """
        settings = self.settings
        layers = settings.layers
        if isinstance(layers, str):
            tied = bool(getattr(self.base.model.config, "tie_word_embeddings", False))
            layers = bucket(layers, len(self.base.layout), tied)
            if not layers:
                raise UnsupportedUseError(
                    f"'{self.base.name}' has too few layers for the bucket {settings.layers!r}; "
                    "name them (--model.layers)"
                )
        exits = self.exits(layers, settings.early_exit_norm)
        plan = DoLaPlan(exits, settings.relative_top, settings.legacy_divergence)
        return DoLaEdit(self.base, plan, self.origin(requests, layers=layers))


def bucket(name: Bucket, depth: int, tied: bool) -> list[int]:
    """Every second layer of a half of a model; of a deep one, of its 20 lowest or highest layers.

    The embedding is left out where it is tied to the head.

    >>> bucket("low", 32, tied=False)
    [0, 2, 4, 6, 8, 10, 12, 14]
    >>> bucket("high", 6, tied=True)
    [3, 5]
    """
    half = depth // 2 if depth <= _DEEP else _DEEP // 2
    if name == "low":
        return list(range(2 if tied else 0, half, 2))
    return list(range(depth // 2 if depth <= _DEEP else depth - half, depth, 2))
