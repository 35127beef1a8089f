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

import torch
from torch import Tensor, nn

from kedit_lightning.base_models.blocks import (
    PROBE_TOKENS,
    Block,
    find_blocks,
    read_probe,
    removing,
    text_config,
)
from kedit_lightning.base_models.mixture import no_dense_mlp, routed_block
from kedit_lightning.base_models.unembedding import find_final_norm
from kedit_lightning.base_models.write_path import WritePath, measure_write_path
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.projections import (
    as_rows,
    find_module,
    first_tensor,
    projection_shape,
    projections_in,
    with_first,
)
from kedit_lightning.errors import ModuleNotLocatedError

#: Relative size above which a value counts as moved: in 8-bit kernels tokens touch each other.
_MOVES = 5e-2


def _beside(down: str, order: list[str]) -> list[str]:
    """The projections that run before one and have the same owner.

    Where each has an owner of its own, as in BERT, those that have the owner of the one before.
    """
    ran = order[: order.index(down)]
    owners = {key.rpartition(".")[0]: None for key in (*ran[-1:], down)}
    shared = [[key for key in ran if key.rpartition(".")[0] == owner] for owner in owners]
    return shared[-1] or shared[0]


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
        self._structures: dict[Any, tuple[str, tuple[str, ...]] | None] = {}

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
        found: dict[int, list[int]] = {}
        for index in range(len(self)):
            with suppress(ModuleNotLocatedError):
                down = self.model.get_submodule(self.block(index).down)
                found.setdefault(id(next(down.parameters(), down)), []).append(index)
        own = [layers[0] for layers in found.values() if len(layers) == 1]
        if found and not own:
            shared = [self.block_name(index) for index in next(iter(found.values()))]
            raise ModuleNotLocatedError(
                f"the blocks of model type '{self.model_type}' that have a dense MLP share it "
                f"(weights are tied in '{shared[0]}' and '{shared[1]}'), so a change of one would "
                "change others; use IKE or SERAC, which edit no weights"
            )
        if not own:
            self.block(0)  # raises
        return tuple(own)

    @cached_property
    def mlp_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks that methods for routed experts as well choose from.

        Those with a dense MLP, or where no block has one those with routed experts.

        Raises:
            ModuleNotLocatedError: There are neither.
        """
        with suppress(ModuleNotLocatedError):
            return self.dense_layers
        routed = [i for i in range(len(self)) if self._routed(i) is not None]
        return tuple(routed) or self.dense_layers  # raises

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
            described = self._describe(self.block_name(index), self._found[1][index])
            if described is None:
                name, routed = self.block_name(index), self._routed(index) is not None
                raise no_dense_mlp(name, self.model_type, routed)
            self._described[index] = described
        return self._described[index]

    def mlp_block(self, index: int) -> Block:
        """The block with a number, described by its routed experts if it has no dense MLP.

        Raises:
            ModuleNotLocatedError: There is no such block, or it has neither.
        """
        try:
            return self.block(index)
        except ModuleNotLocatedError:
            routed = self._routed(index) if -len(self) <= index < len(self) else None
            if routed is None:
                raise
            return routed

    def _routed(self, index: int) -> Block | None:
        """The block with a number and its routed experts, if it has any."""
        name, block = self.block_name(index % len(self)), self._found[1][index]
        return routed_block(name, block, self.hidden_size)

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
        block = self.mlp_block(index)
        owner = self.model.get_submodule(block.name)
        mlp = {name.removeprefix(f"{block.name}.") for name in block.projections}
        matrices = projections_in(owner)
        ran = self._inputs_of(matrices)
        # A mixer that runs behind the MLP, as in Zamba, gives it nothing.
        before_mlp = takewhile(lambda key: key != block.down.removeprefix(f"{block.name}."), ran)
        matrices = {k: matrices[k] for k in before_mlp if k not in mlp}
        plain = {key: ran[key] for key in matrices}
        for key in reversed(plain):
            if projection_shape(matrices[key])[1] != self.hidden_size:
                continue
            before = list(plain)[: list(plain).index(key)]
            moved = self._inputs_of(matrices, change=before)[key]
            change = (moved - plain[key]).float().norm(dim=1)
            if before and bool(change[-1] > _MOVES * plain[key].float().norm(dim=1)[-1]):
                return f"{block.name}.{key}"
        raise ModuleNotLocatedError(
            f"block '{block.name}' has no projection that writes what attention has read for its "
            "MLP; use MEMIT, which needs none"
        )

    # ---- location by structure

    def _describe(self, name: str, block: nn.Module) -> Block | None:
        matrices = projections_in(block)
        structure = tuple((key, type(m), projection_shape(m)) for key, m in matrices.items())
        if structure not in self._structures:
            self._structures[structure] = self._locate(matrices)
        located = self._structures[structure]
        if located is None:
            return None
        down, inner = located
        # What all of the MLP lies in: in OPT and BERT that is only the block itself.
        nested = zip(*(key.split(".")[:-1] for key in (*inner, down)), strict=False)
        owner = ".".join(part for part, *_ in takewhile(lambda p: len({*p}) == 1, nested))
        projections = tuple(f"{name}.{key}" for key in (*inner, down))
        return Block(name, projections[-1], f"{name}.{owner or down}", projections)

    def _locate(self, matrices: dict[str, nn.Module]) -> tuple[str, tuple[str, ...]] | None:
        """Names, inside the block, of its down projection and of the matrices before it."""
        seen = self._inputs_of(matrices)
        shapes = {key: projection_shape(matrices[key]) for key in seen}
        hidden = self.hidden_size
        writing = [key for key in reversed(seen) if shapes[key][1] == hidden]
        for down in sorted(writing, key=lambda key: -shapes[key][0]):  # of equals the last to run
            width = shapes[down][0]
            beside = _beside(down, list(seen))
            inner = [k for k in beside if shapes[k] in ((hidden, width), (hidden, 2 * width))]
            if self._fed_by_token(down, beside, matrices, seen[down]):
                return down, tuple(inner)
        return None

    def _inputs_of(
        self, matrices: dict[str, nn.Module], change: Iterable[str] = ()
    ) -> dict[str, Tensor]:
        """Inputs of projections in the order they run, ``[tokens, d_in]`` each.

        The output of those in ``change`` is changed for the first token.
        """
        seen: dict[str, Tensor] = {}

        def note(key: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                rows = args[0].detach().reshape(-1, args[0].shape[-1])
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
            read_probe(self.model)
        return seen

    def _fed_by_token(
        self, key: str, beside: list[str], matrices: dict[str, nn.Module], plain: Tensor
    ) -> bool:
        """Whether the matrices beside a projection feed it, each token from that token alone."""
        if len(plain) != PROBE_TOKENS:
            return False
        moved = self._inputs_of({k: matrices[k] for k in (*beside, key)}, change=beside)[key]
        moves = (moved - plain).float().norm(dim=1) > _MOVES * plain.float().norm(dim=1)
        return bool(moves[0]) and not bool(moves[1:].any())
