"""Finding a decoder's parts by structure, not by name.

The down projection is, of the matrices in a block that write ``hidden`` values, the widest one that
matrices beside it feed token by token.  Those of attention and of state-space mixers feed theirs
across tokens, the experts of a mixture see some tokens only, and adapters and per-layer embeddings
are narrower.  The MLP's other projections are the matrices beside it that read ``hidden`` values
and feed its width.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from typing import Any

from torch import nn

from kedit_lightning.base_models.blocks import Block, find_blocks, text_config
from kedit_lightning.base_models.location import (
    MOVES,
    LocatedParts,
    locate_parts,
    projection_inputs,
)
from kedit_lightning.base_models.mixture import no_dense_mlp, routed_block, shared_mlp
from kedit_lightning.base_models.unembedding import find_final_norm
from kedit_lightning.base_models.write_path import WritePath, measure_write_path
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.projections import (
    find_module,
    projection_shape,
    projections_in,
)
from kedit_lightning.errors import ModuleNotLocatedError


class Layout:
    """The parts of a decoder, located on first use and remembered.

    Args:
        model: A causal language model, or a sequence-to-sequence one.
        of_encoder: Describe the encoder of a sequence-to-sequence model instead.
    """

    def __init__(self, model: nn.Module, of_encoder: bool = False) -> None:
        self.model = model
        self._of_encoder = of_encoder
        self._described: dict[int, Block] = {}
        self._paths: dict[str, WritePath] = {}
        self._structures: dict[Any, LocatedParts] = {}

    @cached_property
    def _found(self) -> tuple[str, nn.ModuleList]:
        return find_blocks(self.model, self._of_encoder)

    @cached_property
    def encoder(self) -> Layout:
        """The parts of the encoder; only an encoder-decoder has one."""
        return Layout(self.model, of_encoder=True)

    @cached_property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        config = text_config(self.model, self._of_encoder)
        return int(getattr(config, "hidden_size", None) or config.d_model)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks from first to last.

        Raises:
            ModuleNotLocatedError: A block has no dense MLP.
        """
        return tuple(self.block(index) for index in range(len(self)))

    @cached_property
    def dense_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks with a dense MLP of their own: in most models all of them.

        In a mixture of experts some have none, and in Zamba some have that of another block.

        Raises:
            ModuleNotLocatedError: No block has one.
        """
        own = tuple(layers[0] for layers in self._sharing if len(layers) == 1)
        if self._sharing and not own:
            raise self._shared(self._sharing[0])
        if not own:
            self.block(0)  # raises
        return own

    @cached_property
    def _sharing(self) -> list[list[int]]:
        """Numbers of the blocks with a dense MLP; those that have one together stand together."""
        found: dict[int, list[int]] = {}
        for index in range(len(self)):
            with suppress(ModuleNotLocatedError):
                down = self.model.get_submodule(self.block(index).down)
                found.setdefault(id(next(down.parameters(), down)), []).append(index)
        return [*found.values()]

    def _shared(self, layers: list[int]) -> ModuleNotLocatedError:
        """What to raise about blocks that have one MLP together."""
        return shared_mlp([self.block_name(index) for index in layers], self.model_type)

    @cached_property
    def mlp_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks that methods for routed experts as well choose from.

        Those with a dense MLP of their own, or where no block has one those with routed experts,
        or else those that are a token mixer alone.

        Raises:
            ModuleNotLocatedError: There are none of these.
        """
        with suppress(ModuleNotLocatedError):
            return self.dense_layers
        for described in (self._routed, self._mixer):
            if layers := tuple(i for i in range(len(self)) if described(i) is not None):
                return layers
        return self.dense_layers  # raises

    @property
    def dense_blocks(self) -> tuple[Block, ...]:
        """The blocks of :attr:`dense_layers`."""
        return tuple(self.block(index) for index in self.dense_layers)

    @cached_property
    def head(self) -> str:
        """Name of the output embedding, which turns hidden states into logits.

        Raises:
            ModuleNotLocatedError: The model has none.
        """
        model: Any = self.model
        output = model.get_output_embeddings()
        for name, module in model.named_modules():
            if module is output:
                return str(name)
        raise ModuleNotLocatedError(
            f"a model of type '{model.config.model_type}' has no output embedding, so its hidden "
            "states cannot be turned into logits; use a model with a language-modelling head"
        )

    @cached_property
    def final_norm(self) -> str | None:
        """Name of the module that normalises the last hidden state for the head.

        ``None`` where the head reads the last block's output itself.  With it, logits are
        ``head(final_norm(hidden))``, up to a factor or soft cap of the model's own.

        Raises:
            ModuleNotLocatedError: No single module leads from the last block to the head, or this
                is an encoder.
        """
        if self._of_encoder:
            raise ModuleNotLocatedError(
                "the encoder of an encoder-decoder has no head; ask for its decoder's final norm"
            )
        return find_final_norm(self.model, self.block_name(len(self) - 1), self.head)

    @property
    def model_type(self) -> str:
        """Type of the model that the blocks belong to, as its configuration states it."""
        return str(text_config(self.model, self._of_encoder).model_type)

    def __len__(self) -> int:
        return len(self._found[1])

    def block_name(self, index: int) -> str:
        """Name of the block with a number, whatever it consists of."""
        return f"{self._found[0]}.{index}"

    def first_block(self, modules: Iterable[str]) -> int:
        """Number of the first block that holds one of the modules; 0 where one is in no block."""
        list_name = self._found[0]
        places = [name.removeprefix(f"{list_name}.").partition(".") for name in modules]
        inside = [name.startswith(f"{list_name}.") for name in modules]
        return min(int(place[0]) for place in places) if all(inside) else 0

    def has_in_blocks(self, module: str) -> bool:
        """Whether a module lies in one of the blocks."""
        return module.startswith(f"{self._found[0]}.")

    def block(self, index: int) -> Block:
        """The block with a number; negative numbers count from the end.

        Raises:
            ModuleNotLocatedError: There is no such block, or it has no dense MLP.
        """
        count = len(self)
        if not -count <= index < count:
            raise ModuleNotLocatedError(
                f"layer {index} does not exist: the base model has {count} layers, 0 to {count - 1}"
            )
        index %= count
        if index not in self._described:
            described = self._describe(index)
            if described is None:
                name, routed = self.block_name(index), self._routed(index) is not None
                raise no_dense_mlp(name, self.model_type, self._parts(index).reason, routed)
            self._described[index] = described
        return self._described[index]

    def mlp_block(self, index: int) -> Block:
        """The block with a number, described by its routed experts if it has no dense MLP.

        In a model without either it is described by its token mixer.

        Raises:
            ModuleNotLocatedError: There is no such block, it has none of these, or its MLP is that
                of other blocks too.
        """
        block = self._any_block(index)
        for layers in self._sharing:
            if len(layers) > 1 and index % len(self) in layers:
                raise self._shared(layers)
        return block

    def _any_block(self, index: int) -> Block:
        """The same, even where its MLP is that of other blocks too."""
        try:
            return self.block(index)
        except ModuleNotLocatedError:
            count = len(self)
            found = self._routed(index) if -count <= index < count else None
            if found is None and -count <= index < count and index % count in self.mlp_layers:
                found = self._mixer(index % count)
            if found is None:
                raise
            return found

    def _routed(self, index: int) -> Block | None:
        """The block with a number and its routed experts, if it has any."""
        name, block = self.block_name(index % len(self)), self._found[1][index]
        return routed_block(name, block, self.hidden_size)

    def _mixer(self, index: int) -> Block | None:
        """The block with a number and its token mixer, if it is that alone."""
        if (key := self._parts(index).mixer) is None:
            return None
        down = f"{self.block_name(index)}.{key}"
        return Block(self.block_name(index), down, down, (down,))

    @cached_property
    def is_gated(self) -> bool:
        """Whether the MLPs have more than one projection before the one that writes."""
        first = self.mlp_block(self.mlp_layers[0])
        modules = [find_module(self.model, name) for name in first.projections]
        if isinstance(modules[0], ExpertProjection):
            return modules[0].experts.is_gated
        written = projection_shape(modules[0])[1]
        fused = len(modules) == 2 and written == 2 * projection_shape(modules[1])[0]
        return fused or len(modules) > 2

    def write_path(self, index: int) -> WritePath:
        """How the down projection of a block writes to its output; measured once, without edits."""
        block = self.mlp_block(index)
        if block.name not in self._paths:
            names = block.name, block.writer
            self._paths[block.name] = measure_write_path(self.model, *names, self.hidden_size)
        return self._paths[block.name]

    def attention(self, index: int) -> str:
        """The last matrix before the MLP that writes ``hidden`` values and that mixes tokens.

        Raises:
            ModuleNotLocatedError: The block has none.
        """
        block = self._any_block(index)
        owner = self.model.get_submodule(block.name)
        mlp = {name.removeprefix(f"{block.name}.") for name in block.projections}
        matrices = projections_in(owner)
        ran = projection_inputs(self.model, matrices)
        # A mixer that runs behind the MLP, as in Zamba, gives it nothing.
        before_mlp = takewhile(lambda key: key != block.down.removeprefix(f"{block.name}."), ran)
        matrices = {k: matrices[k] for k in before_mlp if k not in mlp}
        plain = {key: ran[key] for key in matrices}
        for key in reversed(plain):
            if projection_shape(matrices[key])[1] != self.hidden_size:
                continue
            before = list(plain)[: list(plain).index(key)]
            moved = projection_inputs(self.model, matrices, before)[key]
            change = (moved - plain[key]).float().norm(dim=1)
            if before and bool(change[-1] > MOVES * plain[key].float().norm(dim=1)[-1]):
                return f"{block.name}.{key}"
        raise ModuleNotLocatedError(
            f"block '{block.name}' has no projection that writes what attention has read for its "
            "MLP; use MEMIT, which needs none"
        )

    # ---- location by structure

    def _parts(self, index: int) -> LocatedParts:
        """What the block with a number has; blocks in which projections are alike have the same."""
        block = self._found[1][index]
        matrices = projections_in(block)
        shapes = tuple((key, type(m), projection_shape(m)) for key, m in matrices.items())
        structure = shapes, tuple(key for key, _ in block.named_children())
        if structure not in self._structures:
            self._structures[structure] = locate_parts(self.model, block, self.hidden_size)
        return self._structures[structure]

    def _describe(self, index: int) -> Block | None:
        name, parts = self.block_name(index), self._parts(index)
        if parts.down is None:
            return None
        keys = (*parts.inner, parts.down)
        # What all of the MLP lies in: in OPT and BERT that is only the block itself.
        nested = zip(*(key.split(".")[:-1] for key in keys), strict=False)
        owner = ".".join(part for part, *_ in takewhile(lambda p: len({*p}) == 1, nested))
        projections = tuple(f"{name}.{key}" for key in keys)
        return Block(name, projections[-1], f"{name}.{owner or parts.down}", projections)
