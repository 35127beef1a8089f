"""What methods that edit a located layer share: statistics of its keys, and contexts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.errors import StatisticsNotFoundError
from kedit_lightning.methods.locate.shared.contexts import sample_contexts
from kedit_lightning.methods.locate.shared.statistics_fit import StatisticsFit
from kedit_lightning.statistics import (
    estimate_from_few_samples,
    factorise,
    find_statistics,
    shrunk,
)

#: Where the statistics of keys come from: ``auto`` takes collected ones and falls back to a small
#: packaged text, ``required`` refuses to fall back, ``identity`` does without.
StatisticsMode: TypeAlias = Literal["auto", "required", "identity"]


#: Matrices of layers up to this many bytes are held together.
_HELD = 32 << 20

Key = TypeVar("Key", bound=Hashable)


class Held(Generic[Key]):
    """What was derived from statistics, by layer: all of it while small, else the last layer's.

    So a walk over layers never holds the matrices of two wide ones.
    """

    def __init__(self) -> None:
        self._values: dict[Key, tuple[Tensor, Any]] = {}

    def get(self, key: Key, make: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """The matrix of a key and what belongs to it, made when it is not held."""
        if key not in self._values:
            if sum(matrix.nbytes for matrix, _ in self._values.values()) > _HELD:
                self._values.clear()
            self._values[key] = make()
        return self._values[key]

    def clear(self) -> None:
        """Hold nothing."""
        self._values.clear()


class LocateMethod(StatisticsFit):
    """Base of methods that solve for the weights of a located layer.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        statistics: Where the statistics of keys come from: ``auto``, ``required`` or ``identity``.
        contexts: Number of texts put before each prompt while its value is optimised.
        fit_length: Tokens after which ``fit`` cuts a text.
        fit_tokens: Tokens after which ``fit`` stops; it reads all text if not given.
        fit_error: Relative standard error of the statistics at which ``fit`` stops, once it has
            read 10 tokens a dimension; it reads all text if not given.
        seed: Start of all random choices.
    """

    #: Lengths in tokens of the texts put before prompts; each makes an equal part of them.
    context_lengths: ClassVar[tuple[int, ...]] = (10,)

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        statistics: StatisticsMode = "auto",
        contexts: int = 20,
        *,
        fit_length: int = 512,
        fit_tokens: int | None = None,
        fit_error: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(base_model, seed)
        # Statistics are a pass over text without an optimizer.
        self.automatic_optimization = False
        self._context_texts: tuple[str, ...] | None = None
        self._factors: Held[tuple[str, float]] = Held()
        self._statistics_note = ""

    # ---- contexts

    @property
    def context_texts(self) -> tuple[str, ...]:
        """Texts the base model wrote once for this method object."""
        if self._context_texts is None:
            self._context_texts = sample_contexts(
                self.base, self.hparams["contexts"], self.hparams["seed"], self.context_lengths
            )
        return self._context_texts

    # ---- statistics

    def factor(self, module: str, ridge: float = 0.0) -> Tensor:
        """Lower Cholesky factor of the second moment of a layer's keys, ``C + ridge · I``.

        Shape ``[d_in, d_in]``, float64, on the CPU.

        Raises:
            StatisticsNotFoundError: None were collected and ``statistics`` is ``required``.
        """

        def make() -> tuple[Tensor, None]:
            moment = self._second_moment(module)
            moment.diagonal().add_(ridge)
            # Decomposed beside the model, where a wide layer takes a fraction of a second.
            return factorise(moment.to(self.base.device), module).cpu(), None

        return self._factors.get((module, ridge), make)[0]

    @property
    def statistics_note(self) -> str:
        """Which statistics were used, for the edit's record."""
        return self._statistics_note

    def _second_moment(self, module: str) -> Tensor:
        mode: StatisticsMode = self.hparams["statistics"]
        if mode == "identity":
            self._statistics_note = "identity"
            return torch.eye(projection_shape(self.base.module(module))[0], dtype=torch.float64)
        found = find_statistics(self.base, module)
        if found is None or (found.is_few_sample and mode == "required"):
            if mode == "required":
                raise StatisticsNotFoundError(
                    f"no key statistics of layer '{module}' of base model '{self.base.name}' have "
                    f"been collected; run `kedit fit` with {type(self).__name__} and --data Texts, "
                    "or set statistics to auto to estimate them from a small packaged text"
                )
            estimate_from_few_samples(self.base)
            found = find_statistics(self.base, module)
            assert found is not None
        self._statistics_note = found.note
        if found.is_few_sample:
            warnings.warn(
                f"key statistics of '{self.base.name}' are estimated from a small packaged text: "
                f"{found.note}; collect better ones once with `kedit fit --model "
                f"{type(self).__name__} --data Texts --data.path FOLDER`",
                stacklevel=4,
            )
        # Fewer keys than dimensions leave directions of which nothing is known.
        few = found.is_few_sample or found.moment.count < len(found.moment.mean)
        return shrunk(found.moment) if few else found.moment.mean

    def forget_statistics(self) -> None:
        """Drop the factors: they come from statistics that are replaced now."""
        self._factors.clear()
