"""How a change of a down projection's output reaches the output of its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.blocks import read_probe, removing
from kedit_lightning.edits.projections import first_tensor, float_dtype, with_first

#: A block output that follows the MLP output with less than this relative error is linear in it.
#: Rounding in bfloat16 alone gives some 3e-3, a normalisation between the two 1e-1 and more.
_LINEAR = 2e-2


@dataclass(frozen=True)
class WritePath:
    """How a change of a down projection's output reaches the block's output."""

    #: Factor with which it arrives.
    gain: float
    #: Relative size of what a factor cannot explain.
    nonlinearity: float

    @property
    def is_linear(self) -> bool:
        """Whether the block adds a scaled copy, rather than a normalised one."""
        return self.nonlinearity < _LINEAR

    @property
    def exact_gain(self) -> float:
        """The factor, which is 1 where rounding explains that another was measured."""
        return 1.0 if abs(self.gain - 1) <= max(self.nonlinearity, 1e-12) else self.gain


def measure_write_path(model: nn.Module, block: str, down: str, width: int) -> WritePath:
    """Add noise to a down projection's output, ``width`` wide, and compare the block's output."""
    plain = _block_output(model, block, down, None)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(width, generator=generator) * plain.std().cpu()
    # Rounded as the model will round it, so that rounding does not look like a nonlinearity.
    noise = noise.to(plain.device, float_dtype(model)).double()
    # Of two sizes, since a norm passes on the direction of what outweighs its other input.
    added = torch.stack([noise, 4 * noise])[:, None]  # [2, 1, hidden]
    moved = torch.stack([_block_output(model, block, down, x[0]) - plain for x in added])
    # [2, tokens, hidden]; a block with several residual streams gives each token several rows
    moved = moved.reshape(2, -1, width)
    gain = (moved * added).sum() / added.expand_as(moved).square().sum()
    rest = (moved - gain * added).norm() / moved.norm()
    return WritePath(float(gain), float(rest))


def _block_output(model: nn.Module, block: str, down: str, add: Tensor | None) -> Tensor:
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(first_tensor(output).detach())

    def shift(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = first_tensor(output)
        return None if add is None else with_first(output, y + add.to(y))

    hooks = {block: note, down: shift}
    with removing([model.get_submodule(n).register_forward_hook(h) for n, h in hooks.items()]):
        read_probe(model)
    return seen[-1].double()
