"""The parameter shift of a weight from value differences, by ridge regression.

For keys ``K`` (``[n, d_in]``) and value differences ``V`` (``[n, d_out]``) the shift is
``S = argmin ‖K S − V‖² + λ tr(Sᵀ M S)``, with ``M = I`` for the norm of ``S``.  With few keys it is
``M⁻¹ Kᵀ (K M⁻¹ Kᵀ + λI)⁻¹ V``, of low rank; with more keys than ``d_in`` it is
``(Kᵀ K + λM)⁻¹ Kᵀ V``, and neither time nor memory of the solve grows with their number.  Either
way a linear system ``A X = B`` is solved, whose gradients are known in closed form.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.hypernetwork.shared.outer_loss import Delta
from kedit_lightning.methods.hypernetwork.shared.tensor_file import StoredTensor, TensorFile
from kedit_lightning.methods.training.distributed import several_ranks, sum_over_ranks


class Sizes(NamedTuple):
    """Numbers that a shift takes as low-rank factors (infinite if it has none) and as a matrix."""

    low_rank: float
    dense: int

    @classmethod
    def of(cls, d_in: int, d_out: int, keys: int | None) -> Sizes:
        """Storage of a shift ``[d_in, d_out]`` of rank ``keys``; ``None`` without factors."""
        return cls(math.inf if keys is None else keys * (d_in + d_out), d_in * d_out)


def smaller_dense(sizes: Iterable[Sizes]) -> bool:
    """Whether the shifts of an edit together are smaller as dense matrices than as factors."""
    return sum(size.low_rank - size.dense for size in sizes) > 0


@dataclass(frozen=True)
class RidgeShift:
    """The solution ``X`` of ``A X = B``, and the shift that it gives.

    Args:
        unknown: ``X``: the shift itself, ``[d_in, d_out]``, or, with ``keys``, its factor
            ``[n, d_out]``.
        factor: Lower Cholesky factor of ``A = Kᵀ K + λM``, or, with ``keys``, of
            ``K M⁻¹ Kᵀ + λI``.
        keys: ``K M⁻¹``, for a shift ``M⁻¹ Kᵀ X``. Shape ``[n, d_in]``.
        slope: ``dA/dλ`` unless it is the identity. Shape ``[d_in, d_in]``.
    """

    unknown: Tensor
    factor: Tensor
    keys: Tensor | None
    slope: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The shift ``S``. Shape ``[d_in, d_out]``."""
        return self.unknown if self.keys is None else self.keys.T.to(self.unknown) @ self.unknown

    def delta(self, unknown: Tensor) -> Delta:
        """The weight delta ``Δ = Sᵀ`` that another ``X`` would give, differentiable in it."""
        if self.keys is None:
            return unknown.T
        return LowRankDelta(self.keys.to(unknown), unknown.T)

    @property
    def sizes(self) -> Sizes:
        """Storage of the shift."""
        rows, d_out = self.unknown.shape
        if self.keys is None:
            return Sizes.of(rows, d_out, None)
        return Sizes.of(self.keys.shape[1], d_out, rows)

    def squared_norm(self, unknown: Tensor) -> Tensor:
        """``‖S‖²`` of the shift that another ``X`` would give, differentiable in it."""
        unknown = unknown.to(self.factor)
        shift = unknown if self.keys is None else self.keys.T.to(unknown) @ unknown
        return shift.square().sum()

    def pull_back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a loss in ``B`` and in ``λ``, from its gradient in ``X``.

        Args:
            gradient: Gradient in ``X``. Shape of ``X``.

        Returns:
            Gradient in ``B`` (the adjoint), of the shape of ``X``, and in ``λ``, a scalar.
        """
        adjoint = torch.cholesky_solve(gradient.to(self.factor), self.factor)
        slope = self.unknown if self.slope is None else self.slope @ self.unknown
        return adjoint, -(adjoint * slope).sum()

    def gradient_of_values(self, adjoint: Tensor, keys: Tensor, first: int) -> Tensor:
        """Gradient of a loss in some rows of ``V``, from its gradient in ``B``.

        Args:
            adjoint: Gradient in ``B``, from :meth:`pull_back`.
            keys: The keys of these rows. Shape ``[m, d_in]``.
            first: Index of the first of them among all keys.

        Returns:
            Shape ``[m, d_out]``.
        """
        if self.keys is not None:
            return adjoint[first : first + len(keys)]
        return keys.to(adjoint) @ adjoint


class NormalEquations:
    """Accumulates keys and value differences of one projection, and solves for its shift.

    Rows are stored in a file, and many rows are summed one part after another, so memory does not
    grow with their number.  Sums and solutions are float64.

    Args:
        d_in: Width of the keys.
        d_out: Width of the values.
        file: Stores the rows.
    """

    def __init__(self, d_in: int, d_out: int, file: TensorFile) -> None:
        self._shape = (d_in, d_out)
        self._file = file
        self._parts: list[tuple[StoredTensor, StoredTensor]] = []
        self._rows = 0

    @property
    def sizes(self) -> Sizes:
        """Storage of the shift that :meth:`solve` gives for the rows of this rank."""
        return Sizes.of(*self._shape, None if self._rows > self._shape[0] else self._rows)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Add rows.

        Args:
            keys: Shape ``[m, d_in]``.
            values: Their value differences. Shape ``[m, d_out]``.

        Raises:
            TemporaryFileError: There is no space for them.
        """
        self._parts.append((self._file.put(keys), self._file.put(values)))
        self._rows += len(keys)

    def solve(
        self, ridge: Tensor, metric: Tensor | None = None, over_ranks: bool = False
    ) -> RidgeShift:
        """The shift; NaN where ``A`` is not positive definite.

        Args:
            ridge: ``λ``. A scalar.
            metric: ``M``, positive definite; the identity if absent. Shape ``[d_in, d_in]``.
            over_ranks: Include the rows of the other ranks, all of which must then solve.
        """
        ridge = ridge.detach()
        over_ranks = over_ranks and several_ranks()
        if over_ranks or self._rows > self._shape[0]:
            gram, moment = self._sums(ridge.device)
            if over_ranks:
                sum_over_ranks((gram, moment))
            factor = _cholesky(gram, ridge, metric)
            return RidgeShift(torch.cholesky_solve(moment, factor), factor, None, metric)
        keys, values = (
            torch.cat([self._file.get(stored) for stored in parts])
            for parts in zip(*self._parts, strict=True)
        )
        directions, gram = _directions(keys, metric)
        factor = _cholesky(gram, ridge)
        return RidgeShift(torch.cholesky_solve(values.double(), factor), factor, directions)

    def _sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``Kᵀ K`` and ``Kᵀ V``, with one part of the rows in memory at a time."""
        d_in, d_out = self._shape
        gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        moment = torch.zeros(d_in, d_out, dtype=torch.float64, device=device)
        for part in self._parts:
            keys, values = (self._file.get(stored).double() for stored in part)
            gram.addmm_(keys.T, keys)
            moment.addmm_(keys.T, values)
        return gram, moment


def _directions(keys: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """``K M⁻¹``, in the dtype of the keys, and ``K M⁻¹ Kᵀ`` in float64."""
    precise = keys.double()
    if metric is None:
        return keys, precise @ precise.T
    directions = torch.cholesky_solve(precise.T, torch.linalg.cholesky(metric)).T
    return directions.to(keys), precise @ directions.T


def _cholesky(gram: Tensor, ridge: Tensor, metric: Tensor | None = None) -> Tensor:
    """Lower factor of ``gram + λM``; NaN throughout where it is not positive definite.

    Changes ``gram`` in place, as it is the largest matrix of a solve.
    """
    if metric is None:
        gram.diagonal().add_(ridge.to(gram))
    else:
        gram.addcmul_(metric, ridge.to(gram))
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    return factor.masked_fill_((failed != 0) | ~torch.isfinite(ridge), torch.nan)
