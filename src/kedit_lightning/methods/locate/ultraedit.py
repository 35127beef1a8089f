"""UltraEdit (Gu et al. 2025): one gradient of many facts, normalised and regressed into weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec, TokenRows
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.layout import Layout
from kedit_lightning.edits import Edit, LowRankDelta, LowRankEdit, memories
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kept_equations import keeps_equations
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.methods.capabilities import Count, Positive
from kedit_lightning.methods.locate.shared.least_squares import ridge_update, size_prior
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import answered_rows, encoded_answers
from kedit_lightning.methods.shared.gradient_factors import Factors, capture_factors, predicting
from kedit_lightning.methods.shared.moments import Moments, merge, moments
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.methods.shared.row_memory import requests_at_a_time
from kedit_lightning.requests import EditRequest

#: Answer tokens below which the statistics say little; one token alone gives an edit of zeros.
_FEW = 10
#: Names of moments in the memory of an edit.
_PARTS = ("mean", "squares", "count")
#: Names of what an edit is solved from.
_FACTORS = ("inputs", "gradients")
#: Bytes of an entry of inputs and gradients, in their own dtype and in those of the regression.
_COPIES = 32
#: A column whose standard deviation is below this share of its mean counts as constant: the rest is
#: rounding, in half precision inputs as well, since those are exact in float64.
_CONSTANT = 1e-10


@dataclass(frozen=True)
class UltraEditSettings(MethodSettings):
    """Settings of :class:`UltraEdit`."""

    layers: list[int] | None
    modules: list[str] | None
    lr: Positive | None
    batch_size: Count
    legacy_shared_statistics: bool


@dataclass(frozen=True)
class UltraEditDefaults:
    """Defaults that follow the base model.

    Args:
        blocks: Blocks whose projection is edited, by the projection's index in its MLP; all
            projections of the last third of the blocks if not given.
        lr: Learning rate; the paper has one for all its models.
    """

    blocks: Mapping[int, Sequence[int]] | None = None
    lr: float = 1e-6

    def modules(self, layout: Layout, layers: Sequence[int] | None) -> list[str]:
        """Names of the projections that are edited: all of the given layers, if any are given."""
        if layers is None and self.blocks is not None:
            return [layout.block(i).projections[n] for n, at in self.blocks.items() for i in at]
        if layers is None:
            layers = nearest_layers(layout.dense_layers, last_third(len(layout)))
        return [name for i in layers for name in layout.block(i).projections]


def last_third(blocks: int) -> range:
    """The blocks that are edited in a model without published settings.

    >>> last_third(32), last_third(6), last_third(1)
    (range(21, 32), range(4, 6), range(0, 1))
    """
    return range(blocks - max(1, round(blocks / 3)), blocks)


class UltraEdit(EditMethod):
    """Moves the outputs of MLP projections against their normalised gradients, for many facts.

    One pass forward and back over the facts, no subject, no statistics of keys.  Gradients are
    normalised by all answer tokens so far, which the edits on the stack remember, so it needs
    several facts at a time and is made for thousands in a row.

    Settings left at ``None`` follow the base model: published ones where it is known, else a rule.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        layers: Blocks whose MLP projections are edited.
        modules: Names of the projections to edit, instead of ``layers``.
        lr: Learning rate. The published one suits models of seven thousand million weights; for a
            small one take the largest that keeps other answers on facts held out.
        batch_size: Facts of one pass through the model; it changes no result.
        legacy_shared_statistics: Share the statistics among all weights of a shape, as the
            released code does; gate and up projections of all layers are then mixed.
        seed: Start of all random choices; that of the run when absent.
    """

    settings_type = UltraEditSettings
    settings: UltraEditSettings
    can: ClassVar[Capabilities] = Capabilities(adapter=True, weights=True, images=True)

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        layers: list[int] | None = None,
        modules: list[str] | None = None,
        lr: float | None = None,
        batch_size: int = 10,
        legacy_shared_statistics: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Resolve settings that follow the base model, and find the projections.

        Raises:
            UnsupportedUseError: A projection cannot be edited.
        """
        given = self.settings
        usual = published_settings(self.base, "UltraEdit", UltraEditDefaults) or UltraEditDefaults()
        modules = given.modules or usual.modules(self.base.layout, given.layers)
        self.projections = tuple(dict.fromkeys(modules))
        self.lr = usual.lr if given.lr is None else float(given.lr)
        for name in self.projections:
            check_editable(self.base.model, name)
        self.settings = replace(given, modules=list(self.projections), lr=self.lr)

    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Regress the normalised gradients of the requests' answers into the weights.

        Raises:
            NonFiniteError: An input or a gradient of a projection is NaN or infinite.
        """
        whole = {name: part[:2] for name, part in self._capture(requests).items()}
        return self._edit(requests, whole, memories(self.base, type(self).__name__))

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose edits fit into memory together, at least 1."""
        rows = encoded_answers(self.base, requests)
        shapes = [projection_shape(self.base.module(name)) for name in self.projections]
        own = _COPIES * max(len(row.answer) for row in rows) * sum(map(sum, shapes))
        return requests_at_a_time(self.base, 0, [[row] for row in rows], own)

    def edits_together(self, requests: Sequence[EditRequest]) -> list[Edit]:
        """The edit of each request, as it is without the others."""
        captured = self._capture(requests)
        past = memories(self.base, type(self).__name__)
        return [
            self._edit(
                [request],
                {name: (h[rows == i], v[rows == i]) for name, (h, v, rows) in captured.items()},
                past,
            )
            for i, request in enumerate(requests)
        ]

    def _edit(
        self,
        requests: Sequence[EditRequest],
        captured: Mapping[str, tuple[Tensor, Tensor]],
        past: Sequence[Mapping[str, Tensor]],
    ) -> Edit:
        """The edit of inputs and gradients, on top of what earlier edits remember."""
        batch = {n: moments(torch.cat([h, v], 1).double()) for n, (h, v) in captured.items()}
        statistics = self._statistics(batch, past)
        self._warn_if_few(statistics)
        origin = self.origin(requests, modules=list(captured), lr=self.lr)
        deltas = self._regressed(captured, statistics)
        edit = LowRankEdit(self.base, deltas, origin, _to_memory(batch))
        if keeps_equations():
            edit.equations = {
                f"{name}/{part}": tensor.detach().cpu().contiguous()
                for name, factors in captured.items()
                for part, tensor in zip(_FACTORS, factors, strict=True)
            }
        return edit

    def solved_again(
        self, edit: LowRankEdit, past: Sequence[Mapping[str, Tensor]], missing: object = None
    ) -> Edit:
        """An edit of the same inputs and gradients, with the statistics of other edits below it.

        Args:
            edit: The edit, with its equations.
            past: Memories of the edits of this method that are below it now, oldest first.
            missing: Changes that are below it no more; inputs and gradients are kept as they are.
        """
        kept, device = edit.equations or {}, self.base.device
        captured = {
            name: (kept[f"{name}/inputs"].to(device), kept[f"{name}/gradients"].to(device))
            for name in edit.factors
        }
        batch = {name: _from_memory(edit.memory, name, device) for name in edit.factors}
        deltas = self._regressed(captured, self._statistics(batch, past))
        new = LowRankEdit(edit.base, deltas, edit.origin, edit.memory)
        new.equations = edit.equations
        return new

    def _regressed(
        self, captured: Mapping[str, tuple[Tensor, Tensor]], statistics: Mapping[str, Moments]
    ) -> dict[str, LowRankDelta]:
        deltas = {}
        for name, (inputs, gradients) in captured.items():
            check_finite("inputs", name, inputs)
            check_finite("output gradients", name, gradients)
            delta = regress_normalised(inputs, gradients, statistics[name], self.lr)
            deltas[name] = delta.to(compute_dtype(self.base.dtype))
        return deltas

    # ---- gradients

    def _capture(self, requests: Sequence[EditRequest]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Inputs and output gradients of the projections at the answers' tokens.

        Their third part is the number of the request that each token belongs to.
        """
        size, parts = self.settings.batch_size, []
        for start in range(0, len(requests), size):
            some = requests[start : start + size]
            rows = answered_rows(self.base, some)
            factors = capture_factors(self.base, rows, self.projections, predicting(rows))
            parts.append(
                {name: (*_of_summed_loss(f, rows), start + f.rows) for name, f in factors.items()}
            )
        return {
            name: (
                torch.cat([part[name][0] for part in parts]),
                torch.cat([part[name][1] for part in parts]),
                torch.cat([part[name][2] for part in parts]),
            )
            for name in self.projections
        }

    # ---- statistics, which live in the edits

    def _statistics(
        self, batch: Mapping[str, Moments], past: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Moments]:
        """Moments of all tokens so far: those that earlier edits remember, and of the batch."""
        running = {}
        for name, new in batch.items():
            known = [m for m in past if f"{name}.mean" in m]
            running[name] = reduce(
                merge, [*(_from_memory(m, name, new[0].device) for m in known), new]
            )
        if not self.settings.legacy_shared_statistics:
            return running
        shapes = {name: projection_shape(self.base.module(name)) for name in running}
        return {
            name: reduce(merge, [known for n, known in running.items() if shapes[n] == shape])
            for name, shape in shapes.items()
        }

    def _warn_if_few(self, statistics: Mapping[str, Moments]) -> None:
        count = min(int(count) for _, _, count in statistics.values())
        if count >= _FEW:
            return
        warnings.warn(
            f"UltraEdit has seen {count} answer tokens so far, and normalises gradients by their "
            "statistics, so expect weak edits (none at all of a single token); write more facts at "
            "once (the paper writes 100), in protocol batch or sequential, or choose ROME for "
            "single facts",
            stacklevel=5,
        )


def _of_summed_loss(factors: Factors, rows: TokenRows) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of the loss summed over answer tokens, from those of each row's mean."""
    lengths = rows.answer_mask.sum(1).to(factors.gradients)
    return factors.inputs, factors.gradients * lengths[factors.rows.to(lengths.device), None]


def _to_memory(batch: Mapping[str, Moments]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, values in batch.items()
        for part, tensor in zip(_PARTS, values, strict=True)
    }


def _from_memory(memory: Mapping[str, Tensor], name: str, device: torch.device) -> Moments:
    mean, squares, count = (memory[f"{name}.{part}"].to(device) for part in _PARTS)
    return mean, squares, count


def normalised(rows: Tensor, statistics: Moments) -> Tensor:
    """Rows with mean 0 and standard deviation 1, column by column; constant columns become 0.

    The result does not change when rows and statistics are scaled together.

    Args:
        rows: Shape ``[n, width]``.
        statistics: Moments of all rows seen, these among them.

    Returns:
        Shape ``[n, width]``.
    """
    mean, squares, count = statistics
    deviation = (squares / (count - 1).clamp(min=1)).sqrt()
    varies = deviation > _CONSTANT * mean.abs()
    return torch.where(varies, (rows - mean) / torch.where(varies, deviation, 1), 0)


def regress_normalised(
    inputs: Tensor, gradients: Tensor, statistics: Moments, lr: float
) -> LowRankDelta:
    """The change of a weight that moves each token's output against its normalised gradient.

    ``V' = -lr · ‖ĥ‖² · v̂`` and ``Δᵀ = (HᵀH + I)⁻¹ HᵀV'``, with hats for normalised rows and ``H``
    as it is (Gu et al. 2025, "UltraEdit"): the change that comes closest to the wanted moves in
    ridge regression.  It is solved in the smaller of the two dimensions.

    Args:
        inputs: ``H``, what the projection received. Shape ``[n, d_in]``.
        gradients: ``V``, of the loss with respect to its output. Shape ``[n, d_out]``.
        statistics: Moments of ``[H | V]`` over all tokens so far, these among them.
        lr: Learning rate.

    Returns:
        ``Δ`` of rank ``min(n, d_in)``, float64.
    """
    inputs, gradients = inputs.double(), gradients.double()
    both = normalised(torch.cat([inputs, gradients], dim=1), statistics)
    keys, values = both.split([inputs.shape[1], gradients.shape[1]], dim=1)
    moves = -lr * keys.square().sum(1, keepdim=True) * values
    if len(inputs) > inputs.shape[1]:
        # HᵀH = RᵀR and HᵀV' = Rᵀ(QᵀV'): R may stand for H.
        basis, inputs = torch.linalg.qr(inputs)
        moves = basis.T @ moves
    return ridge_update(inputs.T, moves.T, size_prior(), eps=1.0)
