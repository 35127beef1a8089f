"""One edit of every kind, with random content, for any tiny base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from support import REQUESTS
from torch import Tensor

from kedit_lightning import BaseModel, Edit
from kedit_lightning.base_models.taps import capture
from kedit_lightning.edits import (
    AdapterEdit,
    BlocksEdit,
    CodebookEdit,
    CompositeEdit,
    DecodingEdit,
    Deferral,
    DeferralEdit,
    DenseEdit,
    EditOrigin,
    LowRankDelta,
    LowRankEdit,
    NeuronsEdit,
    OverlapEdit,
    OverlapPlan,
    PromptEdit,
    PromptEntry,
    SideEdit,
    SidePlan,
)
from kedit_lightning.edits.kinds.blocks.clusters import BlockEntry
from kedit_lightning.edits.kinds.codebook.codebook import CodebookEntry, Replacement
from kedit_lightning.edits.kinds.neurons.neurons import MLPPlace, Neurons
from kedit_lightning.edits.projections import projection_shape

PROMPTS = [request.prompt for request in REQUESTS]
ANSWERS = [request.target_new for request in REQUESTS]


class BonusEdit(DecodingEdit):
    """Makes some tokens likelier wherever the next token is chosen."""

    kind: ClassVar[str] = "bonus"

    def __init__(
        self, base: Any, tokens: dict[int, float], origin: EditOrigin | None = None
    ) -> None:
        super().__init__(base, origin)
        self.tokens = tokens

    def adjust(self, logits: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        changed = logits.clone()
        for token, bonus in self.tokens.items():
            changed[..., token] += bonus
        return changed

    def state(self):
        return {}, {"tokens": [[token, bonus] for token, bonus in self.tokens.items()]}

    @classmethod
    def from_state(cls, base, origin, tensors, values):
        tokens = {int(token): float(bonus) for token, bonus in values["tokens"]}
        if not all(0 <= token < 384 for token in tokens):
            raise ValueError("no such token")
        return cls(base, tokens, origin)


def origin_of(base: BaseModel, method: str = "", **fields: Any) -> EditOrigin:
    """An origin as a method would write it."""
    return EditOrigin(
        method=method,
        base_model=base.name,
        fingerprint=base.fingerprint,
        tokenizer_fingerprint=base.tokenizer_fingerprint,
        **fields,
    )


def random(*shape: int, like: torch.dtype, seed: int = 0) -> Tensor:
    """Random numbers that depend on the seed alone, in at least float32."""
    numbers = torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return numbers.to(torch.promote_types(like, torch.float32))


def factors(base: BaseModel, module: str, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ``A`` and ``B`` for a projection."""
    d_in, d_out = projection_shape(base.module(module))
    a = random(rank, d_in, like=base.dtype, seed=seed) / d_in**0.5
    return a, random(d_out, rank, like=base.dtype, seed=seed + 1)


def low_rank(base: BaseModel, layer: int = 1, seed: int = 0, **origin: Any) -> LowRankEdit:
    """A rank-two edit of two down projections."""
    names = [base.layout.block(layer).down, base.layout.block(layer + 1).down]
    pairs = {name: factors(base, name, seed=seed + 7 * i) for i, name in enumerate(names)}
    return LowRankEdit(base, pairs, origin_of(base, **origin))


def remembering(base: BaseModel, layer: int = 1, seed: int = 0, **origin: Any) -> LowRankEdit:
    """A low-rank edit with a memory for later edits; one name ends as those of factors do."""
    edit = low_rank(base, layer, seed, **origin)
    memory = {"keys.A": random(5, 3, like=base.dtype, seed=seed), "count": torch.tensor([7 + seed])}
    return LowRankEdit(base, edit.factors, edit.origin, memory)


def adapter(base: BaseModel) -> AdapterEdit:
    """An adapter of all matrices of one MLP."""
    names = base.layout.block(0).projections
    return AdapterEdit(base, {n: factors(base, n, seed=3) for n in names}, origin_of(base))


def dense(base: BaseModel, layer: int = 1, seed: int = 20) -> DenseEdit:
    """A dense change of the matrices of one MLP, and of their biases where there are any."""
    changes = {}
    for name in base.layout.block(layer).projections:
        module = base.module(name)
        d_in, d_out = projection_shape(module)
        bias = None
        if getattr(module, "bias", None) is not None:
            bias = random(d_out, like=base.dtype, seed=seed + 1)
        changes[name] = (random(d_out, d_in, like=base.dtype, seed=seed) / d_in**0.5, bias)
    return DenseEdit(base, changes, origin_of(base))


def last_key(base: BaseModel, prompt: str, module: str) -> Tensor:
    """Input of a module at the last token of a prompt."""
    rows = base.rows([prompt])
    with torch.no_grad(), capture(base.model, [module]) as seen:
        base.forward(rows)
    return seen.inputs[module][0, int(rows.prompt_end[0])]


def codebook(
    base: BaseModel,
    prompt: str = PROMPTS[0],
    replacement: Replacement = "last",
    radius: float = 1e-3,
    seed: int = 40,
    layer: int = 1,
) -> CodebookEdit:
    """A codebook that recognises one prompt."""
    module = base.layout.block(layer).down
    value = 50 * random(projection_shape(base.module(module))[1], like=base.dtype, seed=seed)
    key = last_key(base, prompt, module).to(value.dtype)
    entry = CodebookEntry(key, value, (seed,), radius)
    return CodebookEdit(base, module, [entry], replacement, origin_of(base))


def blocks(base: BaseModel, prompt: str = PROMPTS[0], seed: int = 80, layer: int = 1) -> BlocksEdit:
    """Two low-rank blocks above one layer; one is for a prompt, and the other for none here."""
    key_module = base.layout.block(layer).projections[0]
    changed = base.layout.block(layer + 1).down
    d_in, d_out = projection_shape(base.module(changed))
    a = random(2, 3, d_in, like=base.dtype, seed=seed)
    b = random(2, d_out, 3, like=base.dtype, seed=seed + 1)
    rows = base.rows([prompt])
    with torch.no_grad(), capture(base.model, [key_module]) as seen:
        base.forward(rows)
    key = seen.outputs[key_module][0, int(rows.prompt_end[0])].to(a.dtype)
    entries = [BlockEntry(key, (seed,), 1e-3, 1), BlockEntry(key + 9, (seed + 1,), 1e-3, 0)]
    return BlocksEdit(base, key_module, {changed: LowRankDelta(a, b)}, entries, origin_of(base))


def neurons(base: BaseModel, layer: int = 1, count: int = 5, seed: int = 60) -> NeuronsEdit:
    """Neurons beside one MLP, some of which fire on most tokens."""
    block = base.layout.block(layer)
    place = MLPPlace(block.projections[0], block.down)
    d_in = projection_shape(base.module(place.reads))[0]
    d_out = projection_shape(base.module(place.writes))[1]
    keys, biases, values, queries = (
        random(*shape, like=base.dtype, seed=seed + i)
        for i, shape in enumerate([(count, d_in), (count,), (count, d_out), (2, d_in)])
    )
    return NeuronsEdit(base, {place: Neurons(keys, biases, 3 * values, queries)}, origin_of(base))


def deferral(base: BaseModel, prompt: str = PROMPTS[0], seed: int = 80) -> DeferralEdit:
    """A gate that opens for one prompt alone."""
    module = base.layout.block(1).down
    d_in, d_out = projection_shape(base.module(module))
    key = last_key(base, prompt, module).to(torch.promote_types(base.dtype, torch.float32))
    change = random(d_out, d_in, like=base.dtype, seed=seed)
    bias = random(d_out, like=base.dtype, seed=seed + 1)
    share = Deferral(10 * key / key.norm() ** 2, key.new_tensor([-9.5]), change, bias)
    return DeferralEdit(base, module, share, origin_of(base))


def overlap(base: BaseModel, prompt: str = PROMPTS[0], seed: int = 70) -> OverlapEdit:
    """A residual memory that recognises one prompt."""
    module = base.layout.block(1).down
    d_in, d_out = projection_shape(base.module(module))
    plan = OverlapPlan(module, active=d_in // 4, threshold=0.9)
    key = last_key(base, prompt, module).to(torch.promote_types(base.dtype, torch.float32))
    centre = torch.zeros_like(key)
    values = random(d_out, d_in // 4, like=base.dtype, seed=seed)
    return OverlapEdit(base, plan, plan.masks(key[None], centre), values, centre, origin_of(base))


def side(base: BaseModel, prompt: str = PROMPTS[0], seed: int = 60, layer: int = 1) -> SideEdit:
    """A side memory that recognises one prompt."""
    plan = SidePlan(base.layout.block(layer).down, mask_ratio=0.5)
    d_in, d_out = projection_shape(base.module(plan.module))
    key = last_key(base, prompt, plan.module)[None].to(
        torch.promote_types(base.dtype, torch.float32)
    )
    change = torch.outer(random(d_out, like=base.dtype, seed=seed), key[0]) / key.norm()
    values = change[plan.mask((d_out, d_in), 0)]
    return SideEdit(base, plan, 0, values, key.to(values.dtype), origin_of(base))


def prompt_edit(base: BaseModel) -> PromptEdit:
    """A fact stated before each prompt."""
    entry = PromptEntry(PROMPTS[0], "New Fact: Lyon is in Norway.\n", ("Rome is in Italy.\n",))
    return PromptEdit(base, [entry], origin_of(base))


def bonus(base: BaseModel) -> BonusEdit:
    """Makes one token likelier."""
    return BonusEdit(base, {70: 60.0}, origin_of(base))


def composite(base: BaseModel) -> CompositeEdit:
    """Edits of four kinds in one."""
    members = [remembering(base), dense(base, 0), prompt_edit(base), bonus(base)]
    return CompositeEdit(base, members, origin_of(base))


KINDS: dict[str, Callable[[BaseModel], Edit]] = {
    "low_rank": low_rank,
    "remembering": remembering,
    "dense": dense,
    "adapter": adapter,
    "codebook": codebook,
    "blocks": blocks,
    "neurons": neurons,
    "deferral": deferral,
    "overlap": overlap,
    "side": side,
    "prompt": prompt_edit,
    "bonus": bonus,
    "composite": composite,
}
#: Kinds that change weights, and so have deltas.
WEIGHT_KINDS = ("low_rank", "remembering", "dense", "adapter")


@torch.no_grad()
def answers(base: BaseModel, **options: Any) -> Tensor:
    """Logits of the answers, as the model now stands, all edits in force. ``[4, width, vocab]``."""
    rows = base.rows(PROMPTS, ANSWERS, **options)
    logits = base.answer_logits(rows)
    return torch.where(rows.answer_mask[..., None], logits, 0)


@torch.no_grad()
def raw_logits(model: Any) -> Tensor:
    """Logits of a call of the model itself, past everything of ours."""
    ids = torch.tensor([[5, 40, 77, 12, 9], [8, 8, 91, 30, 2]])
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder).logits
