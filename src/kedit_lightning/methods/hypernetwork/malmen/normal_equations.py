"""One shift of a weight from many wanted changes of its outputs, by ridge regression.

For keys ``K`` (``[n, d_in]``) and wanted changes ``V`` (``[n, d_out]``) of their values the shift
is ``S = argmin ‖K S − V‖² + λ tr(Sᵀ M S)``, with ``M = I`` for the norm of ``S``.  Where keys are
few it is ``M⁻¹ Kᵀ (K M⁻¹ Kᵀ + λI)⁻¹ V``, two thin matrices; where they outnumber the width of the
inputs it is ``(Kᵀ K + λM)⁻¹ Kᵀ V``, and neither time nor memory of the solve grows with their
number.  Either way a system ``A X = B`` is solved, through which gradients are taken in closed
form.

Source: Tan et al. 2024, "Massive Editing for Large Language Models via Meta Learning", section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.methods.hypernetwork.malmen.tensor_file import Kept, TensorFile
from kedit_lightning.methods.training.distributed import several_ranks, sum_over_ranks


@dataclass(frozen=True)
class Sizes:
    """How many numbers a shift is.

    Args:
        thin: As two thin matrices; infinite where there are none.
        dense: As one matrix.
    """

    thin: float
    dense: int

    @classmethod
    def of(cls, d_in: int, d_out: int, keys: int | None) -> Sizes:
        """Those of a shift ``[d_in, d_out]`` from a number of keys; ``None`` where it has none."""
        return cls(math.inf if keys is None else keys * (d_in + d_out), d_in * d_out)


def smaller_dense(sizes: Iterable[Sizes]) -> bool:
    """Whether the shifts of an edit are fewer numbers together as dense matrices than as thin."""
    sizes = list(sizes)
    return sum(own.thin for own in sizes) > sum(own.dense for own in sizes)


@dataclass(frozen=True)
class RidgeShift:
    """The solution ``X`` of ``A X = B``, and how it is a shift of a weight.

    Args:
        unknown: ``X``: the shift itself, ``[d_in, d_out]``, or where there are ``keys`` what they
            are combined with, ``[n, d_out]``.
        factor: Lower Cholesky factor of ``A = Kᵀ K + λM``, or where there are ``keys`` of
            ``K M⁻¹ Kᵀ + λI``.
        keys: ``K M⁻¹``, for a shift ``M⁻¹ Kᵀ X``. Shape ``[n, d_in]``.
        slope: ``dA/dλ`` where it is not the identity. Shape ``[d_in, d_in]``.
    """

    unknown: Tensor
    factor: Tensor
    keys: Tensor | None
    slope: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """The shift ``S``. Shape ``[d_in, d_out]``."""
        return self.unknown if self.keys is None else self.keys.T.to(self.unknown) @ self.unknown

    @property
    def sizes(self) -> Sizes:
        """How many numbers it is."""
        rows, d_out = self.unknown.shape
        if self.keys is None:
            return Sizes.of(rows, d_out, None)
        return Sizes.of(self.keys.shape[1], d_out, rows)

    def squared_norm(self, unknown: Tensor) -> Tensor:
        """``‖S‖²`` of the shift that another ``X`` would give, differentiable in it."""
        unknown = unknown.to(self.factor)
        if self.keys is None:
            return unknown.square().sum()
        return (self.keys.T.to(unknown) @ unknown).square().sum()

    def pull_back(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a loss with respect to ``B`` and to ``λ``, from that to ``X``.

        Args:
            gradient: Shape of ``X``.

        Returns:
            Shape of ``X``, and a scalar.
        """
        pulled = torch.cholesky_solve(gradient.to(self.factor), self.factor)
        moved = self.unknown if self.slope is None else self.slope @ self.unknown
        return pulled, -(pulled * moved).sum()

    def gradient_of_values(self, pulled: Tensor, keys: Tensor, first: int) -> Tensor:
        """Gradient with respect to some rows of ``V``, from that to ``B``.

        Args:
            pulled: What :meth:`pull_back` gives.
            keys: The keys of these rows. Shape ``[m, d_in]``.
            first: Place of the first of them among all keys.

        Returns:
            Shape ``[m, d_out]``.
        """
        if self.keys is not None:
            return pulled[first : first + len(keys)]
        return keys.to(pulled) @ pulled


class NormalEquations:
    """Takes in keys and wanted changes of values of one projection, and solves for the shift.

    Rows wait in a file, and are summed up one part after another where they are many, so memory
    does not grow with their number.  Sums and solutions are float64.

    Args:
        d_in: Width of the keys.
        d_out: Width of the values.
        file: Where rows wait.
    """

    def __init__(self, d_in: int, d_out: int, file: TensorFile) -> None:
        self._shape = (d_in, d_out)
        self._file = file
        self._parts: list[tuple[Kept, Kept]] = []
        self._rows = 0

    @property
    def sizes(self) -> Sizes:
        """Of the shift that :meth:`solve` gives for the rows of this rank."""
        return Sizes.of(*self._shape, None if self._rows > self._shape[0] else self._rows)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take in rows.

        Args:
            keys: Shape ``[m, d_in]``.
            values: Shape ``[m, d_out]``.

        Raises:
            TemporaryFileError: There is no space for them.
        """
        self._parts.append((self._file.put(keys), self._file.put(values)))
        self._rows += len(keys)

    def solve(
        self, strength: Tensor, metric: Tensor | None = None, over_ranks: bool = False
    ) -> RidgeShift:
        """The shift; NaN where the equations have no bounded solution.

        Args:
            strength: ``λ``. A scalar.
            metric: ``M``, positive definite; the identity where absent. Shape ``[d_in, d_in]``.
            over_ranks: Take in the rows of the other ranks, where there are several; all must then
                solve.
        """
        strength = strength.detach()
        over_ranks = over_ranks and several_ranks()
        if over_ranks or self._rows > self._shape[0]:
            gram, moment = self._sums(strength.device)
            if over_ranks:
                sum_over_ranks((gram, moment))
            factor = _cholesky(gram, strength, metric)
            return RidgeShift(torch.cholesky_solve(moment, factor), factor, None, metric)
        keys, values = (
            torch.cat([self._file.get(kept) for kept in parts])
            for parts in zip(*self._parts, strict=True)
        )
        directions, gram = _directions(keys, metric)
        factor = _cholesky(gram, strength)
        return RidgeShift(torch.cholesky_solve(values.double(), factor), factor, directions)

    def _sums(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``Kᵀ K`` and ``Kᵀ V``, with one part of the rows in memory at a time."""
        d_in, d_out = self._shape
        gram = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        moment = torch.zeros(d_in, d_out, dtype=torch.float64, device=device)
        for part in self._parts:
            keys, values = (self._file.get(kept).double() for kept in part)
            gram.addmm_(keys.T, keys)
            moment.addmm_(keys.T, values)
        return gram, moment


def _directions(keys: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """``K M⁻¹``, in the number type of the keys, and ``K M⁻¹ Kᵀ``."""
    precise = keys.double()
    if metric is None:
        return keys, precise @ precise.T
    directions = torch.cholesky_solve(precise.T, torch.linalg.cholesky(metric)).T
    return directions.to(keys), precise @ directions.T


def _cholesky(gram: Tensor, strength: Tensor, metric: Tensor | None = None) -> Tensor:
    """Lower factor of ``gram + λM``; NaN throughout where it is not positive definite.

    Adds to ``gram`` in place: it is the largest matrix of a solve.
    """
    if metric is None:
        gram.diagonal().add_(strength.to(gram))
    else:
        gram.addcmul_(metric, strength.to(gram))
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram)
    return factor.masked_fill_((failed != 0) | ~torch.isfinite(strength), torch.nan)
