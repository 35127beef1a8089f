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

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.methods.ranks import several_ranks, sum_over_ranks


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

    Rows are held as they come, up to the number of ``d_in``, and are summed up beyond it, so memory
    has a bound.  Sums and solutions are float64.

    Args:
        d_in: Width of the keys.
        d_out: Width of the values.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        self._shape = (d_in, d_out)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None

    @property
    def has_many_rows(self) -> bool:
        """Whether there are more rows than ``d_in``, or rows of other ranks."""
        return self._sums is not None

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Take in rows.

        Args:
            keys: Shape ``[m, d_in]``.
            values: Shape ``[m, d_out]``.
        """
        self._held.append((keys.detach(), values.detach()))
        if self.has_many_rows or sum(len(keys) for keys, _ in self._held) > self._shape[0]:
            self._sum_up()

    def _sum_up(self) -> None:
        for held in self._held:
            keys, values = (part.double() for part in held)
            if self._sums is None:
                d_in, d_out = self._shape
                self._sums = keys.new_zeros(d_in, d_in), keys.new_zeros(d_in, d_out)
            gram, moment = self._sums
            gram.addmm_(keys.T, keys)
            moment.addmm_(keys.T, values)
        self._held = []

    def over_ranks(self) -> None:
        """Take in the rows of the other ranks, where there are several; all must call it."""
        if several_ranks():
            self._sum_up()
            sum_over_ranks(self._sums or ())

    def solve(self, strength: Tensor, metric: Tensor | None = None) -> RidgeShift:
        """The shift; NaN where the equations have no bounded solution.

        Args:
            strength: ``λ``. A scalar.
            metric: ``M``, positive definite; the identity where absent. Shape ``[d_in, d_in]``.
        """
        if self._sums is not None:
            gram, moment = self._sums
            factor = _cholesky(gram, strength, metric)
            return RidgeShift(torch.cholesky_solve(moment, factor), factor, None, metric)
        keys, values = (torch.cat(parts) for parts in zip(*self._held, strict=True))
        precise = directions = keys.double()
        if metric is not None:
            root = torch.linalg.cholesky(metric)
            directions = torch.cholesky_solve(precise.T, root).T
        factor = _cholesky(precise @ directions.T, strength)
        unknown = torch.cholesky_solve(values.double(), factor)
        return RidgeShift(unknown, factor, keys if metric is None else directions.to(keys))


def _cholesky(gram: Tensor, strength: Tensor, metric: Tensor | None = None) -> Tensor:
    """Lower factor of ``gram + λM``; NaN throughout where it is not positive definite."""
    metric = torch.eye(len(gram)).to(gram) if metric is None else metric
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram + metric * strength.detach().to(gram))
    return factor.masked_fill(failed != 0, torch.nan)
