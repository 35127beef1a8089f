"""MELO: low-rank blocks, of which a prompt gets the one of the facts that it is near to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.base_models.layer_choice import nearest_layers
from kedit_lightning.base_models.taps import capture, stop_after, visiting
from kedit_lightning.edits import BlocksEdit
from kedit_lightning.edits.edit import check_finite
from kedit_lightning.edits.kinds.blocks.clusters import BlockEntry
from kedit_lightning.edits.low_rank import LowRankBatch, LowRankDelta
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.prompt_routing import at_columns
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import Count, CountOrZero, NotNegative, Positive
from kedit_lightning.methods.method import Capabilities, EditMethod, MethodSettings
from kedit_lightning.methods.shared.answer_passes import AnswerPasses, encoded_answers
from kedit_lightning.methods.shared.losses import gradients_of
from kedit_lightning.methods.shared.published_settings import published_settings
from kedit_lightning.requests import EditRequest

#: Depth of the keys as a share of the blocks, as in GPT-2 XL; the blocks behind it are trained.
USUAL_DEPTH = 0.73
#: How many blocks are trained.
TRAINED = 2
#: Radius of a new cluster in a model without a published one, as a share of the length of its key.
USUAL_RADIUS = 0.25
#: The learning rate is halved after so many steps.
HALVED_AFTER = 30


@dataclass(frozen=True)
class MELODefaults:
    """Settings of :class:`MELO` that follow the base model."""

    key_layer: int
    layers: Sequence[int]
    projection: int = 0
    radius: float | None = None
    lr: float = 1e-2
    scale: float = 1.0


@dataclass(frozen=True)
class MELOSettings(MethodSettings):
    """Settings of :class:`MELO`; those that follow the base model once it is built."""

    key_layer: int | None
    layers: list[int] | None
    projection: int | None
    rank: Count
    facts_per_block: Count
    radius: NotNegative | None
    lr: Positive | None
    scale: Positive | None
    steps: CountOrZero


class MELO(EditMethod):
    """Trains a small LoRA block for a few facts, and routes each prompt to the block it is near to.

    Keys of facts, states of a block below at the last prompt token, form clusters by answer. A
    prompt inside a cluster gets the block of its nearest fact, at all of its tokens; all other
    prompts pass bit for bit. Each row of a batch is routed by itself. The clusters follow from the
    edits that are applied, in their order, so any of them can be rolled back. The released code
    forgets facts that a cluster of another answer pushes out; here they stay, and a fact's own
    prompt is always recognised. Paper: https://arxiv.org/abs/2312.11795.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        key_layer: Block whose MLP gives the keys, negative numbers from the end. When absent the
            published one of a known model, or else block 0.73 n of n.
        layers: Blocks that are trained, all above ``key_layer``. When absent the published ones of
            a known model, or else the next two.
        projection: Index, among those of an MLP in the order they run, of the projection that gives
            the keys and is trained; ``-1`` is the down projection. When absent the published one
            of a known model, or else the first.
        rank: Rank of a block.
        facts_per_block: Facts that share a block; more get several blocks.
        radius: Radius of a new cluster. When absent the published one of a known model, or else a
            quarter of the length of the key.
        lr: Learning rate of Adam, halved every 30 steps; 0.01 when absent, unless published
            otherwise.
        scale: Factor on what a block adds; 1 when absent. In the released code it is the number of
            blocks there is room for, on which the published learning rate depends.
        steps: Steps of Adam for each block.
        seed: Seed of the first factors, which depend on the requests too.
    """

    can: ClassVar[Capabilities] = Capabilities(images=True)
    settings_type: ClassVar[type[MethodSettings]] = MELOSettings
    settings: MELOSettings

    def __init__(
        self,
        base_model: BaseModel | BaseModelSpec | str = "nano",
        key_layer: int | None = None,
        layers: list[int] | None = None,
        projection: int | None = None,
        rank: int = 2,
        facts_per_block: int = 4,
        radius: float | None = None,
        lr: float | None = None,
        scale: float | None = None,
        steps: int = 50,
        seed: int | None = None,
    ) -> None:
        super().__init__(base_model, seed)

    def build(self) -> None:
        """Find the projections that give keys and that are trained.

        Raises:
            UnsupportedUseError: A trained block does not lie above the keys, or a projection cannot
                be edited.
            ModuleNotLocatedError: A block does not exist or has no dense MLP.
        """
        settings, layout = self.settings, self.base.layout
        usual = melo_defaults(self.base)
        given = {name: getattr(settings, name) for name in vars(usual)}
        chosen = {k: getattr(usual, k) if v is None else v for k, v in given.items()}
        layers = [layer % len(layout) for layer in chosen["layers"]]
        key_layer = chosen["key_layer"] % len(layout)
        if not layers or min(layers) <= key_layer:
            raise UnsupportedUseError(
                f"MELO trains blocks above that of the keys, and got layers {chosen['layers']} "
                f"with key_layer {chosen['key_layer']}; choose a lower key_layer"
            )
        at = chosen["projection"]
        self.key_module = layout.block(key_layer).projections[at]
        self.trained = tuple(dict.fromkeys(layout.block(i).projections[at] for i in layers))
        for module in (self.key_module, *self.trained):
            check_editable(self.base.model, module)
        self.settings = replace(settings, **{**chosen, "layers": list(chosen["layers"])})

    def compute_edit(self, requests: Sequence[EditRequest]) -> BlocksEdit:
        """Train a block for each few requests, together."""
        (edit,) = self.edited([requests])
        return edit

    def edited(self, groups: Sequence[Sequence[EditRequest]]) -> list[BlocksEdit]:
        """One edit for each group of requests, independent of the others."""
        share = self.settings.facts_per_block
        parts = [[g[i : i + share] for i in range(0, len(g), share)] for g in groups]
        blocks = [block for part in parts for block in part]
        requests = [request for block in blocks for request in block]
        numbers = [number for number, block in enumerate(blocks) for _ in block]
        encoded = encoded_answers(self.base, requests)
        # A row gets its own block in the place of an earlier one.
        with self.base.edits.without(BlocksEdit.family_of(self.key_module, self.trained)):
            keys = self._keys(requests)
            passes = AnswerPasses(self.base, encoded, self.trained)
            factors, losses = self._train(passes, blocks, numbers)
        radius = self.settings.radius
        entries = [
            BlockEntry(
                key,
                row.answer,
                USUAL_RADIUS * float(key.norm()) if radius is None else radius,
                number,
            )
            for key, row, number in zip(keys, encoded, numbers, strict=True)
        ]
        edits, first = [], 0
        for group, part in zip(groups, parts, strict=True):
            own = slice(first, first + len(part))
            mine = [e for e in entries if own.start <= e.block < own.stop]
            edits.append(
                BlocksEdit(
                    self.base,
                    self.key_module,
                    {name: LowRankDelta(d.a[own], d.b[own]) for name, d in factors.items()},
                    [replace(entry, block=entry.block - first) for entry in mine],
                    self.origin(group, modules=self.trained, loss=float(losses[own].mean())),
                )
            )
            first += len(part)
        return edits

    @torch.no_grad()
    def _keys(self, requests: Sequence[EditRequest]) -> Tensor:
        """Output of the key module at the last token of each prompt. Shape ``[n, d]``."""
        base, module = self.base, self.key_module
        rows = base.rows([r.prompt for r in requests], images=[r.image for r in requests])
        with capture(base.model, [module]) as seen, stop_after(base.model, module):
            base.forward(rows)
        return at_columns(seen.outputs[module], rows.prompt_end).to(compute_dtype(base.dtype))

    def _train(
        self,
        passes: AnswerPasses,
        blocks: Sequence[Sequence[EditRequest]],
        numbers: Sequence[int],
    ) -> tuple[dict[str, LowRankDelta], Tensor]:
        """Factors of all blocks by module, and the last loss of each block, ``[blocks]``."""
        settings = self.settings
        assert settings.lr is not None and settings.scale is not None  # noqa: PT018
        factors = {name: self._first_factors(name, blocks) for name in self.trained}
        leaves = [tensor for pair in factors.values() for tensor in pair]
        index = torch.tensor(numbers, device=passes.rows.prompt_end.device)
        optimizer = torch.optim.Adam(leaves, lr=settings.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, HALVED_AFTER, 0.5)
        batches = {name: LowRankBatch(pair, index) for name, pair in factors.items()}
        visits = {
            name: partial(_with_block, batch, settings.scale) for name, batch in batches.items()
        }
        sizes = index.bincount(minlength=len(blocks))
        losses = torch.zeros(len(blocks))
        for _ in range(settings.steps):
            with visiting(self.base.model, visits):
                rows = passes.losses()
            losses = torch.zeros_like(sizes, dtype=rows.dtype).index_add(0, index, rows) / sizes
            check_finite("loss of blocks", ", ".join(self.trained), losses)
            for leaf, gradient in zip(leaves, gradients_of(losses.sum(), leaves), strict=True):
                leaf.grad = gradient
            optimizer.step()
            schedule.step()
        done = {
            name: LowRankDelta(pair.a.detach(), settings.scale * pair.b.detach())
            for name, pair in factors.items()
        }
        return done, losses.detach()

    def _first_factors(self, module: str, blocks: Sequence[Sequence[EditRequest]]) -> LowRankDelta:
        """Trainable factors as LoRA starts them: ``a`` uniform as in a linear layer, ``b`` zero."""
        layer, rank = self.base.module(module), self.settings.rank
        d_in, d_out = projection_shape(layer)
        dtype, device = compute_dtype(self.base.dtype), device_of(layer)
        drawn = [
            torch.rand(rank, d_in, generator=self.generator(block, module), dtype=torch.float64)
            for block in blocks
        ]
        a = ((2 * torch.stack(drawn) - 1) / d_in**0.5).to(device, dtype)
        b = torch.zeros(len(blocks), d_out, rank, dtype=dtype, device=device)
        return LowRankDelta(a.requires_grad_(), b.requires_grad_())


def _with_block(batch: LowRankBatch, scale: float, x: Tensor, y: Tensor) -> Tensor:
    """The output of a projection with a block for each row, ``[batch, tokens, d_out]``."""
    dtype = compute_dtype(y.dtype)
    return (y.to(dtype) + scale * batch.change(x.to(dtype))).to(y.dtype)


def melo_defaults(base: BaseModel) -> MELODefaults:
    """Published settings of a known model, else defaults for its number of blocks."""
    known = published_settings(base, "MELO", MELODefaults)
    if known is not None:
        return known
    dense = base.layout.dense_layers
    if len(dense) < 2:
        raise UnsupportedUseError(
            f"MELO needs two blocks with a dense MLP, one for keys and one above it to train, and "
            f"'{base.name}' has {len(dense)}; use TPatcher or GRACE"
        )
    (key_layer,) = nearest_layers(dense[:-1], [round(USUAL_DEPTH * len(base.layout))])
    above = [layer for layer in dense if layer > key_layer]
    return MELODefaults(key_layer, above[:TRAINED])
