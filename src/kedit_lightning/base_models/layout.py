"""Finding a decoder's parts by structure, not by name.

Rules (tried on tiny models of every decoder family of transformers that the tests build):

* blocks: the list of as many modules as the model has layers that holds most parameters;
* down projection: of the matrices in a block that write ``hidden`` values from another width, the
  one that runs last;
* MLP projections: the matrices beside it that read ``hidden`` values and feed its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from kedit_lightning.edits.modules import (
    first_tensor,
    is_projection,
    projection_shape,
    with_first,
)
from kedit_lightning.errors import ModuleNotLocatedError

_PROBE_TOKENS = 6
#: A block output that follows the MLP output with less than this relative error is linear in it.
_LINEAR = 1e-3


@dataclass(frozen=True)
class Block:
    """Names of the parts of one block that edits are about.

    Args:
        name: The block.
        down: The projection that writes the MLP's result.
        mlp: The module that owns it: the block's MLP, or the projection itself where it has none.
        projections: All matrices of the MLP in the order they run, ``down`` last.
    """

    name: str
    down: str
    mlp: str
    projections: tuple[str, ...]


@dataclass(frozen=True)
class WritePath:
    """How a change of a down projection's output reaches the block's output.

    Args:
        gain: Factor with which it arrives.
        nonlinearity: Relative size of what a factor cannot explain.
    """

    gain: float
    nonlinearity: float

    @property
    def is_linear(self) -> bool:
        """Whether the block adds a scaled copy, rather than a normalised one."""
        return self.nonlinearity < _LINEAR


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config(decoder=True)


def _layer_count(config: Any) -> int:
    for field in ("num_decoder_layers", "num_hidden_layers"):
        if getattr(config, field, None):
            return int(getattr(config, field))
    raise ModuleNotLocatedError(
        f"the configuration of model type '{config.model_type}' does not say how many layers it has"
    )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the decoder's blocks.

    Raises:
        ModuleNotLocatedError: No list of modules has the length the configuration states.
    """
    config = _text_config(model)
    count = _layer_count(config)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if getattr(config, "is_encoder_decoder", False):
        # Encoder and decoder have equal blocks; the decoder's also attend to the encoder.
        lists = [pair for pair in lists if "decoder" in pair[0]] or lists
    if not lists:
        raise ModuleNotLocatedError(
            f"no list of {count} blocks in a model of type '{config.model_type}'; name the layers "
            "yourself, or report the model type"
        )
    return max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


@contextmanager
def _removing(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Layout:
    """The parts of a decoder, found when first asked for.

    Args:
        model: A causal language model, or the decoder side of a sequence-to-sequence one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @cached_property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        config = _text_config(self.model)
        return int(getattr(config, "hidden_size", None) or config.d_model)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks from first to last.

        Raises:
            ModuleNotLocatedError: A block has no dense MLP.
        """
        prefix, modules = find_blocks(self.model)
        order = self._execution_order(modules)
        return tuple(
            self._describe(f"{prefix}.{index}", module, order[index])
            for index, module in enumerate(modules)
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def block(self, index: int) -> Block:
        """The block with a number; negative numbers count from the end.

        Raises:
            ModuleNotLocatedError: There is no such block.
        """
        if not -len(self) <= index < len(self):
            raise ModuleNotLocatedError(
                f"layer {index} does not exist: the base model has {len(self)} layers, "
                f"0 to {len(self) - 1}"
            )
        return self.blocks[index]

    @cached_property
    def is_gated(self) -> bool:
        """Whether the MLPs have more than one projection before the one that writes."""
        return len(self.blocks[0].projections) > 2 or self._fused_gate

    @property
    def _fused_gate(self) -> bool:
        names = self.blocks[0].projections
        if len(names) != 2:
            return False
        up, down = (self.model.get_submodule(name) for name in names)
        return projection_shape(up)[1] == 2 * projection_shape(down)[0]

    def write_path(self, index: int) -> WritePath:
        """Measure how the down projection of a block writes to the block's output."""
        block = self.block(index)
        down = self.model.get_submodule(block.down)
        owner = self.model.get_submodule(block.name)
        plain = self._block_output(owner, down, None)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(plain.shape[-1], generator=generator).to(plain) * plain.std()
        moved = self._block_output(owner, down, noise) - plain
        gain = (moved * noise).sum(-1).mean() / noise.square().sum()
        rest = (moved - gain * noise).norm() / moved.norm()
        return WritePath(float(gain), float(rest))

    # ---- how it is done

    def _inputs(self) -> dict[str, Tensor]:
        device = next(self.model.parameters()).device
        vocabulary = int(_text_config(self.model).vocab_size)
        ids = torch.arange(1, _PROBE_TOKENS + 1, device=device)[None] % vocabulary
        config: Any = self.model.config
        if getattr(config, "is_encoder_decoder", False):
            return {"input_ids": ids, "decoder_input_ids": ids}
        return {"input_ids": ids}

    @torch.no_grad()
    def _run(self) -> None:
        self.model(**self._inputs(), use_cache=False)

    def _execution_order(self, blocks: nn.ModuleList) -> list[list[str]]:
        """Names (inside the block) of the projections each block runs, in the order they run."""
        order: list[list[str]] = [[] for _ in blocks]

        def note(index: int, name: str) -> Any:
            # A later call overwrites an earlier one, as with gradient checkpointing.
            return lambda *_: order[index].append(name)

        handles = [
            module.register_forward_pre_hook(note(index, name))
            for index, block in enumerate(blocks)
            for name, module in block.named_modules()
            if is_projection(module)
        ]
        with _removing(handles):
            self._run()
        return order

    def _describe(self, name: str, block: nn.Module, ran: list[str]) -> Block:
        shapes = {key: projection_shape(block.get_submodule(key)) for key in ran}
        hidden = self.hidden_size
        writers = [key for key in ran if shapes[key][1] == hidden and shapes[key][0] != hidden]
        if not writers:
            raise ModuleNotLocatedError(
                f"block '{name}' of model type '{_text_config(self.model).model_type}' has no dense "
                "MLP projection (a mixture of experts with fused weights has none); methods that "
                "edit MLP weights cannot be used on it"
            )
        down = writers[-1]
        owner = down.rpartition(".")[0]
        width = shapes[down][0]
        inner = [
            key
            for key in dict.fromkeys(ran)
            if key.rpartition(".")[0] == owner
            and shapes[key][0] == hidden
            and shapes[key][1] in (width, 2 * width)
        ]
        return Block(
            name=name,
            down=f"{name}.{down}",
            mlp=f"{name}.{owner}" if owner else f"{name}.{down}",
            projections=(*(f"{name}.{key}" for key in inner), f"{name}.{down}"),
        )

    def _block_output(self, block: nn.Module, down: nn.Module, add: Tensor | None) -> Tensor:
        seen: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda m, a, o: seen.append(first_tensor(o).detach()))
        ]
        if add is not None:
            handles.append(
                down.register_forward_hook(lambda m, a, o: with_first(o, first_tensor(o) + add))
            )
        with _removing(handles):
            self._run()
        return seen[-1].double()
