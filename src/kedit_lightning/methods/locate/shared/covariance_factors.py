"""Factors of the covariances of keys: Cholesky factors for priors, null spaces for AlphaEdit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.memory_budget import memory_budget
from kedit_lightning.base_models.mixture import single_experts
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.errors import StatisticsNotFoundError, UnsupportedUseError
from kedit_lightning.methods.locate.shared.least_squares import (
    Prior,
    blockwise_prior,
    covariance_prior,
)
from kedit_lightning.statistics import (
    KeyStatistics,
    chosen_statistics,
    estimate_from_few_samples,
    factorise,
    find_statistics,
    main_directions,
    shrunk,
)

#: Where the covariances of keys come from: ``auto`` takes collected ones and falls back to a small
#: packaged text, ``required`` refuses to fall back, ``identity`` takes the identity matrix.
#: Anything else is the path of a file of statistics, or of a folder of them.
MODES = ("auto", "required", "identity")

#: A matrix with the number that belongs to it.
Factor: TypeAlias = tuple[Tensor, float]
#: The cache keeps matrices of several layers up to this many bytes.
_CACHE_BYTES = 32 << 20
#: A factor stays on a CUDA device if it takes less than this share of what may be used there.
_PLACED_SHARE = 0.1


def check_mode(mode: str) -> None:
    """Raise an ``UnsupportedUseError`` for what is neither a mode nor a path that exists."""
    if mode not in MODES and not Path(mode).expanduser().exists():
        raise UnsupportedUseError(
            f"statistics is '{mode}', which is neither auto, required nor identity, nor a file or "
            f"folder of key statistics (looked in {Path.cwd()})"
        )


class CovarianceFactors:
    """Second moments of the keys of a base model, decomposed once a layer."""

    def __init__(self, base: BaseModel, mode: str, method: str) -> None:
        self.base, self.mode, self.method = base, mode, method
        #: Which statistics were used last, for the record of an edit.
        self.note = ""
        self._factors: dict[Hashable, Factor] = {}
        self._diagonals: dict[str, float] = {}
        #: The factor that was used last, on the CPU and beside the model.
        self._placed: tuple[Tensor, Tensor] | None = None

    def cholesky(self, module: str, ridge: float = 0.0) -> Tensor:
        """Lower Cholesky factor of ``C + ridge · I``, ``[d_in, d_in]`` in float64 on the CPU."""

        def compute() -> Factor:
            moment = self.second_moment(module)
            moment.diagonal().add_(ridge)
            # Decomposed beside the model, where a wide layer takes a fraction of a second.
            return factorise(moment.to(self.base.device), module).cpu(), ridge

        return self.cached(("cholesky", module, ridge), compute)[0]

    def null_space(self, module: str, energy: float, threshold: float | None) -> Factor:
        """Complement of the null space of keys, and their mean squared norm inside it.

        Args:
            module: Name of the projection.
            energy: Share of the energy of the keys that the null space may hold.
            threshold: Largest eigenvalue inside the null space, instead of a share.

        Returns:
            Orthonormal basis of the complement, ``[d_in, r]`` in float64, and the norm.

        Raises:
            UnsupportedUseError: The null space holds nothing of the keys.
        """
        if self.mode == "identity":  # nothing is known of the keys
            return self.second_moment(module)[:, :0], 1.0

        def compute() -> Factor:
            basis, values = main_directions(self.second_moment(module), energy, threshold)
            inside = float(values[: len(values) - basis.shape[1]].sum())
            if inside <= 0:
                raise UnsupportedUseError(
                    f"the null space of layer '{module}' holds nothing of the keys of plain text, "
                    "so the size of a change there has no scale; raise energy, or use MEMIT"
                )
            return basis, inside

        return self.cached(("null space", module, energy, threshold), compute)

    def prior(self, module: str, weight: float, ridge: float = 0.0) -> Prior:
        """The cost ``weight · (C + ridge · I)`` of a change of a projection, or of all experts."""

        def of_one(part: str) -> Prior:
            return covariance_prior(self._beside_model(self.cholesky(part, ridge)), weight)

        return self.blockwise(module, of_one)

    def _beside_model(self, factor: Tensor) -> Tensor:
        """A factor on the device of the model; the last one stays there if it takes little."""
        device = self.base.device
        if device.type != "cuda":
            return factor.to(device)
        if self._placed is None or self._placed[0] is not factor:
            self._placed = None  # before the next takes as much memory
            room = factor.nbytes < _PLACED_SHARE * memory_budget(device)
            placed = factor.to(device)
            if not room:
                return placed
            self._placed = factor, placed
        return self._placed[1]

    def blockwise(self, module: str, of_one: Callable[[str], Prior]) -> Prior:
        """The prior of a projection from that of itself, or of each expert if it is all experts'.

        Products of keys of different experts are left out: all of them would be a matrix of the
        width of all experts together.
        """
        parts = single_experts(self.base.model, module)
        if parts == [module]:
            return of_one(module)
        return blockwise_prior([partial(of_one, name) for name in parts])

    def scale_inside(self, modules: Sequence[str], energy: float, threshold: float | None) -> float:
        """Mean squared norm inside null spaces of the keys of modules in a row."""
        inside = [self.null_space(module, energy, threshold)[1] for module in modules]
        return inside[0] if self.mode == "identity" else sum(inside)

    def second_moment(self, module: str) -> Tensor:
        """``C = E[k kᵀ]`` of the keys of a projection. Shape ``[d_in, d_in]``, float64.

        Raises:
            StatisticsNotFoundError: None were collected and the mode is ``required``.
            DataFileError: The file that the mode names is damaged or of another layer.
        """
        if self.mode == "identity":
            self.note = "identity"
            return torch.eye(projection_shape(self.base.module(module))[0], dtype=torch.float64)
        statistics = self._statistics(module)
        self.note = statistics.note
        if statistics.is_few_sample and self.mode in MODES:
            warnings.warn(
                f"key statistics of '{self.base.name}' are estimated from a small packaged text: "
                f"{self.note}; collect better ones once with `kedit fit --model {self.method} "
                "--data Texts --data.path FOLDER`",
                stacklevel=4,
            )
        moment, experts = statistics.moment, self._experts(module)
        if len(experts) > 1:
            return shrunk(moment, len(experts), self._mean_diagonal(module, experts))
        # Fewer keys than dimensions leave directions of which nothing is known.
        few = statistics.is_few_sample or moment.count < len(moment.mean)
        return shrunk(moment) if few else moment.mean

    def _found(self, module: str) -> KeyStatistics:
        """Statistics of the cache, estimated from few samples where there are none."""
        statistics = find_statistics(self.base, module)
        if statistics is None or (statistics.is_few_sample and self.mode == "required"):
            if self.mode == "required":
                raise StatisticsNotFoundError(
                    f"no key statistics of layer '{module}' of base model '{self.base.name}' have "
                    f"been collected; run `kedit fit` with {self.method} and --data Texts, or set "
                    "statistics to auto to estimate them from a small packaged text"
                )
            experts = self._experts(module)
            estimate_from_few_samples(self.base, experts if len(experts) > 1 else None)
            statistics = find_statistics(self.base, module)
            assert statistics is not None
        return statistics

    def _experts(self, module: str) -> list[str]:
        """All experts of the block that a module is an expert of, else the module alone."""
        projection = self.base.module(module)
        if not isinstance(projection, ExpertProjection):
            return [module]
        return single_experts(self.base.model, projection.fused_name)

    def _mean_diagonal(self, module: str, experts: Sequence[str]) -> float:
        """Mean of the diagonal over all experts of a block, some of which few tokens come to."""
        block = module.rpartition(".")[0]
        if block not in self._diagonals:
            moments = (self._statistics(name).moment.mean for name in experts)
            self._diagonals[block] = float(sum(m.diagonal().mean() for m in moments)) / len(experts)
        return self._diagonals[block]

    def _statistics(self, module: str) -> KeyStatistics:
        if self.mode in MODES:
            return self._found(module)
        return chosen_statistics(self.base, module, self.mode)

    def cached(self, key: Hashable, compute: Callable[[], Factor]) -> Factor:
        """A factor, computed unless kept: those of all layers while small, else of one alone."""
        if key not in self._factors:
            if sum(matrix.nbytes for matrix, _ in self._factors.values()) > _CACHE_BYTES:
                self._factors.clear()
            self._factors[key] = compute()
        return self._factors[key]

    def clear(self) -> None:
        """Drop all factors: the statistics they come from have been replaced."""
        self._factors.clear()
        self._diagonals.clear()
        self._placed = None
