"""The forward hook that adds changes of single experts to the output of all experts of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.edits.effects import AddToOutput, Effect, WeightDelta, sum_deltas
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.experts import RoutedExperts
from kedit_lightning.edits.forward_hooks import known_context
from kedit_lightning.edits.projections import compute_dtype, first_tensor, with_first
from kedit_lightning.edits.row_context import RowContext, copies_of_rows
from kedit_lightning.errors import UnsupportedUseError

#: Effects on projections of the experts of one block.
ExpertEffects: TypeAlias = Sequence[tuple[ExpertProjection, Sequence[Effect]]]


def expert_deltas(effects: ExpertEffects) -> dict[int, WeightDelta]:
    """The sum of changes of each expert's down projection, by its number.

    Raises:
        UnsupportedUseError: An effect is none of weights.
    """
    deltas = {}
    for projection, of_one in effects:
        changes = [effect.delta for effect in of_one if isinstance(effect, AddToOutput)]
        if len(changes) != len(of_one) or projection.expert is None:
            raise UnsupportedUseError(
                f"'{projection.fused_name}' holds experts, which see some tokens only, so an edit "
                "can change the weights of single ones and nothing else of them; let a memory act "
                "on the block"
            )
        delta = sum_deltas(changes, projection)
        if delta is not None:
            deltas[projection.expert] = delta
    return deltas


class ExpertsHook:
    """Adds ``g_e Δ_e k_e`` to the output of tokens that the router sends to changed experts.

    Args:
        experts: The experts of a block.
        shared: Changes for all rows, by expert.
        carried: Rows, and the changes that only they carry, by expert.
        rows: Number of rows that carried changes were given for.
    """

    def __init__(
        self,
        experts: RoutedExperts,
        shared: Mapping[int, WeightDelta],
        carried: Sequence[tuple[Sequence[int], Mapping[int, WeightDelta]]] = (),
        rows: int = 0,
    ) -> None:
        self._experts, self._rows = experts, rows
        #: Changes by expert, each with the numbers of its rows, or ``None`` for all of them.
        self._changes: dict[int, list[tuple[Tensor | None, WeightDelta]]] = {}
        for expert, delta in shared.items():
            self._changes.setdefault(expert, []).append((None, delta))
        for at, deltas in carried:
            for expert, delta in deltas.items():
                self._changes.setdefault(expert, []).append((torch.tensor(at), delta))

    def __call__(self, args: tuple[Any, ...], output: Any, context: RowContext | None) -> Any:
        """Return the changed output of the experts."""
        y, routing = first_tensor(output), self._experts.routing(args)
        tokens, dtype = len(routing.gates), compute_dtype(y.dtype)
        # Where the block adds up the outputs of experts itself, the first takes all changes.
        flat = y.reshape(-1, y.shape[-1])
        row_of = self._rows_of_tokens(tokens, context) if self._rows else None
        total = flat.to(dtype)
        for expert, changes in self._changes.items():
            token, states, gate = routing.of(expert)
            keys, gate = self._experts.keys(expert, states).to(dtype), gate[:, None].to(dtype)
            for rows, delta in changes:
                if rows is None:
                    total = total.index_add(0, token, delta.change(keys) * gate)
                    continue
                assert row_of is not None
                mine = torch.isin(row_of[token], rows.to(token.device)).nonzero()[:, 0]
                change = delta.change(keys[mine]) * gate[mine]
                total = total.index_add(0, token[mine], change)
        return with_first(output, total.to(y.dtype).reshape(y.shape))

    def _rows_of_tokens(self, tokens: int, context: RowContext | None) -> Tensor:
        """The row of each token, beams and several answers of one counted as it. ``[tokens]``."""
        batch = len(known_context(context).prompt_end)
        places = torch.arange(batch).repeat_interleave(tokens // batch)
        return (places // copies_of_rows(batch, self._rows)).to(self._experts.fused.device)
