"""The routed experts of a block, and which of them the router picks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.blocks import Block, removing
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.experts import RoutedExperts, routed_experts
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.projections import find_module
from kedit_lightning.errors import ModuleNotLocatedError


def routed_block(name: str, block: nn.Module, hidden: int) -> Block | None:
    """A block described by its routed experts, those that write ``hidden`` values; if it has any.

    Of several mixtures it is the one of most experts.
    """
    found: dict[str, RoutedExperts] = {}
    for key, module in block.named_modules():
        experts = routed_experts(module)
        if experts is not None and experts.width_out == hidden:
            found[f"{name}.{key}"] = experts
    if not found:
        return None
    owner = max(found, key=lambda key: found[key].count)
    down = f"{owner}.{found[owner].parameter}"
    return Block(name, down, owner, (down,), is_routed=True)


def no_dense_mlp(name: str, model_type: str, reason: str, is_routed: bool) -> ModuleNotLocatedError:
    """What to raise about a block that has none, for methods that need one."""
    said = (
        f"block '{name}' of model type '{model_type}' has no dense MLP projection that reads each "
        "token once"
    )
    if is_routed:
        return ModuleNotLocatedError(
            f"{said}, but routed experts, so methods that edit one cannot be used on it; use FTM "
            "or a closed-form method, which edit experts, or IKE, which edits no weights"
        )
    return ModuleNotLocatedError(
        f"{said} ({reason}), so methods that edit one cannot be used on it; use another block or "
        "model, or IKE, which edits no weights; where blocks are mixers alone, FTM and closed-form "
        "methods edit what they write"
    )


def shared_mlp(blocks: Sequence[str], model_type: str) -> ModuleNotLocatedError:
    """What to raise where blocks, by name, have one MLP together."""
    return ModuleNotLocatedError(
        f"the blocks of model type '{model_type}' that have a dense MLP share it (weights are tied "
        f"in '{blocks[0]}' and '{blocks[1]}'), so a change of one would change others; use IKE or "
        "SERAC, which edit no weights, or FTM or a closed-form method, which edit mixers"
    )


def single_experts(model: nn.Module, name: str) -> list[str]:
    """Names of the projections of single experts that a projection of all is made of, else it."""
    projection = find_module(model, name)
    if not isinstance(projection, ExpertProjection) or projection.expert is not None:
        return [name]
    return [projection.name_of(expert) for expert in projection.numbers]


def split_by_expert(projection: nn.Module, delta: LowRankDelta) -> dict[str, LowRankDelta]:
    """A change of all experts of a block as changes of those that it acts on, by name."""
    assert isinstance(projection, ExpertProjection)
    width = projection.shape[0] // projection.experts.count
    changes = {}
    for expert, a in enumerate(delta.a.split(width, dim=1)):
        acting = a.any(dim=1)
        if bool(acting.any()):
            changes[projection.name_of(expert)] = LowRankDelta(a[acting], delta.b[:, acting])
    return changes


def is_mixture(module: nn.Module) -> bool:
    """Whether a projection is that of all experts of a block."""
    return isinstance(module, ExpertProjection) and module.expert is None


@contextmanager
def picking(
    model: nn.Module, mixtures: Sequence[str], columns: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Note the experts that the router picks at some tokens of the next forward pass.

    Args:
        model: The model.
        mixtures: Names of projections of all experts of blocks.
        columns: Columns of the tokens. Shape ``[batch, n]``.

    Yields:
        After the pass the weights there, ``[batch, n]``, by name of the projection of each expert
        that is picked at one of them.
    """
    picked: dict[str, Tensor] = {}

    def note(projection: ExpertProjection, module: nn.Module, args: tuple[Any, ...]) -> None:
        gates = projection.experts.routing(args).gates
        gates = gates.reshape(len(columns), -1, gates.shape[1])
        rows = torch.arange(len(columns), device=gates.device)[:, None]
        at = gates[rows, columns.to(gates.device)]  # [batch, n, experts]
        for expert in at.flatten(0, 1).any(0).nonzero()[:, 0].tolist():
            picked[projection.name_of(expert)] = at[..., expert]

    handles = []
    for name in mixtures:
        projection = find_module(model, name)
        assert isinstance(projection, ExpertProjection)
        owner = find_module(model, projection.owner)
        handles.append(owner.register_forward_pre_hook(partial(note, projection)))
    with removing(handles):
        yield picked
