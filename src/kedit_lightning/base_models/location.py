"""Location of the projections of a block by what they do in a probe of a few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.blocks import PROBE_TOKENS, read_probe, removing
from kedit_lightning.edits.projections import (
    as_rows,
    first_tensor,
    projection_shape,
    projections_in,
    with_first,
)

#: Relative size above which a value counts as moved: in 8-bit kernels tokens touch each other.
MOVES = 5e-2


@dataclass(frozen=True)
class LocatedParts:
    """Names, inside a block, of what can be edited in it.

    Args:
        down: The projection that writes the result of a dense MLP, if it has one.
        inner: The matrices before it.
        mixer: The projection that writes what a token mixer has read, if the block is that alone.
            A key there is what the mixer has gathered at a token, and a value what the block adds;
            facts of Mamba are edited there, at ``W_o``, in https://arxiv.org/abs/2404.03646.
        reason: Why there is no MLP.
    """

    down: str | None = None
    inner: tuple[str, ...] = ()
    mixer: str | None = None
    reason: str = "a state-space mixer has none"


def locate_parts(model: nn.Module, block: nn.Module, hidden: int) -> LocatedParts:
    """Locate the parts of a block of a model whose residual stream is ``hidden`` wide."""
    matrices = projections_in(block)
    seen = projection_inputs(model, matrices)
    shapes = {key: projection_shape(matrices[key]) for key in seen}
    writing = [key for key in reversed(seen) if shapes[key][1] == hidden]
    for down in sorted(writing, key=lambda key: -shapes[key][0]):  # of equals the last to run
        width = shapes[down][0]
        beside = _beside(down, list(seen))
        inner = [k for k in beside if shapes[k] in ((hidden, width), (hidden, 2 * width))]
        if _fed_by_token(model, down, beside, matrices, seen[down]):
            return LocatedParts(down, tuple(inner))
    read = max((len(seen[key]) for key in writing), default=0)
    if writing and not read:
        return LocatedParts(reason="the block holds tokens before rows")
    if all(len(seen[key]) != PROBE_TOKENS for key in writing):
        return LocatedParts(
            reason=f"projections of the block read {read} tokens where a text has {PROBE_TOKENS}, "
            "since it runs more than once or the model adds tokens"
        )
    alone = len({n.partition(".")[0] for n, p in block.named_parameters() if p.dim() > 1}) == 1
    return LocatedParts(mixer=writing[0] if alone and len(writing) == 1 else None)


def projection_inputs(
    model: nn.Module, matrices: Mapping[str, nn.Module], change: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Inputs of projections in the order they run, ``[tokens, d_in]`` each.

    The output of those in ``change`` is changed for the first token.  Of those that hold tokens
    before rows, as XLNet's do, there are none.
    """
    seen: dict[str, Tensor] = {}

    def note(key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            if args[0].dim() == 3 and args[0].shape[:2] == (PROBE_TOKENS, 1):
                rows = rows[:0]
            seen[key] = torch.cat([seen[key], rows]) if key in seen else rows

        return hook

    def disturb(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = as_rows(first_tensor(output), 1).clone()
        noise = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(0))
        rows[:, 0] += 10 * (rows.std() + 1) * noise.to(rows)
        return with_first(output, rows.reshape(first_tensor(output).shape))

    handles = [m.register_forward_pre_hook(note(key)) for key, m in matrices.items()]
    handles += [matrices[key].register_forward_hook(disturb) for key in change]
    with removing(handles):
        read_probe(model)
    return seen


def _beside(down: str, order: list[str]) -> list[str]:
    """The projections that run before one and have the same owner.

    Where each has an owner of its own, as in BERT, those that have the owner of the one before.
    """
    ran = order[: order.index(down)]
    owners = {key.rpartition(".")[0]: None for key in (*ran[-1:], down)}
    shared = [[key for key in ran if key.rpartition(".")[0] == owner] for owner in owners]
    return shared[-1] or shared[0]


def _fed_by_token(
    model: nn.Module,
    key: str,
    beside: list[str],
    matrices: Mapping[str, nn.Module],
    plain: Tensor,
) -> bool:
    """Whether the matrices beside a projection feed it, each token from that token alone."""
    if len(plain) != PROBE_TOKENS:
        return False
    changed = {k: matrices[k] for k in (*beside, key)}
    moved = projection_inputs(model, changed, change=beside)[key]
    moves = (moved - plain).float().norm(dim=1) > MOVES * plain.float().norm(dim=1)
    return bool(moves[0]) and not bool(moves[1:].any())
