"""Edits of single experts of a mixture, whose matrices lie in one parameter."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from mixtures import FORMS, ROUTED, SHARED, mixture, routed_layer, tiny_mixture
from support import REQUESTS
from torch import Tensor

from kedit_lightning import BaseModel, Edit
from kedit_lightning.base_models import TokenRows
from kedit_lightning.edits import DenseEdit, LowRankEdit
from kedit_lightning.edits.experts import RoutedExperts, routed_experts
from kedit_lightning.errors import UnsupportedUseError

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
MORE = (*ROUTED[len(FORMS) :], *SHARED[1:])
KINDS = [*FORMS, SHARED[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]
PROMPTS = [request.prompt for request in REQUESTS]


@cache
def base_of(kind: str) -> BaseModel:
    return tiny_mixture(kind)


def rows_of(base: BaseModel, prompts: list[str] = PROMPTS) -> TokenRows:
    return base.pad([base.encode(prompt, " Rome") for prompt in prompts])


def logits(base: BaseModel, prompts: list[str] = PROMPTS) -> Tensor:
    with torch.no_grad():
        return base.answer_logits(rows_of(base, prompts))


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank(base: BaseModel, experts: tuple[int, ...] = (0, 3), seed: int = 0) -> LowRankEdit:
    projection = mixture(base, routed_layer(base))
    d_in, d_out = base.module(projection.name_of(0)).shape
    factors = {
        projection.name_of(e): (random(2, d_in, seed=seed + e), random(d_out, 2, seed=seed - e - 1))
        for e in experts
    }
    return LowRankEdit(base, factors)


def dense(base: BaseModel, seed: int = 50) -> DenseEdit:
    projection = mixture(base, routed_layer(base))
    one = base.module(projection.name_of(1))
    d_in, d_out = one.shape
    bias = None if one.bias is None else random(d_out, seed=seed + 1)
    return DenseEdit(base, {projection.name_of(1): (random(d_out, d_in, seed=seed), bias)})


def outputs(base: BaseModel) -> Tensor:
    """What the experts of the edited block give the block, ``[tokens, hidden]``."""
    projection, seen = mixture(base, routed_layer(base)), list[Tensor]()
    owner = base.module(projection.owner)
    handle = owner.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        logits(base)
    finally:
        handle.remove()
    # Llama 4's block adds up the outputs of its experts itself.
    tokens = rows_of(base).attention_mask.numel()
    return seen[-1].reshape(-1, tokens, seen[-1].shape[-1]).sum(0)


@pytest.mark.parametrize("kind", KINDS)
def test_change_is_that_of_the_weights(kind: str) -> None:
    """Written into the fused parameter, in float64, and taken back bit for bit."""
    base = base_of(kind)
    before = logits(base)
    for edit in (low_rank(base), dense(base)):
        plain = outputs(base)
        with edit:
            hooked, answers = outputs(base), logits(base)
        assert float((hooked - plain).abs().max()) > 1e-2
        kept = {name: base.model.get_parameter(name).detach().clone() for name in edit.deltas()}
        try:
            with torch.no_grad():
                for name, delta in edit.deltas().items():
                    base.model.get_parameter(name).add_(delta)
            torch.testing.assert_close(hooked, outputs(base), atol=1e-10, rtol=1e-10)
            # Norms compute in float32.
            torch.testing.assert_close(answers, logits(base), atol=1e-5, rtol=1e-5)
        finally:
            for name, tensor in kept.items():
                base.model.get_parameter(name).data.copy_(tensor)
        copy = BaseModel(edit.materialise(), base.tokenizer, name="copy")
        torch.testing.assert_close(logits(copy), answers, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(base), before)


@pytest.mark.parametrize("kind", KINDS)
def test_only_tokens_of_the_expert_change(kind: str) -> None:
    base = base_of(kind)
    projection = mixture(base, routed_layer(base))
    plain, gates = outputs(base), list[Tensor]()
    owner = base.module(projection.owner)
    handle = owner.register_forward_pre_hook(
        lambda module, args: gates.append(projection.experts.routing(args).gates)
    )
    with low_rank(base, (2,)):
        changed = outputs(base)
    handle.remove()
    goes_there = gates[-1][:, 2] != 0
    assert 0 < int(goes_there.sum()) < len(goes_there)
    assert torch.equal((changed != plain).any(1), goes_there)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_carry_edits_of_their_own(kind: str) -> None:
    base = base_of(kind)
    first, second = low_rank(base), dense(base)
    rows = base.pad([base.encode(prompt, " Rome") for prompt in PROMPTS])
    with low_rank(base, (1,), seed=9), base.edits.carried([first, None, second, first]):
        together = base.answer_logits(rows)
        for number, edit in enumerate([first, None, second, first]):
            with base.edits.carried([edit]):
                alone = logits(base, [PROMPTS[number]])
            torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
def test_padding_and_batch_change_nothing(kind: str) -> None:
    base = base_of(kind)
    rows = [base.encode(prompt, " Rome") for prompt in PROMPTS]
    with low_rank(base):
        left, right = (base.answer_logits(base.pad(rows, side)) for side in ("left", "right"))
        single = torch.cat([base.answer_logits(base.pad([row])) for row in rows])
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left, single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", FORMS)
def test_a_file_gives_the_same_edit(kind: str, tmp_path: Path) -> None:
    base = base_of(kind)
    for edit in (low_rank(base), dense(base)):
        loaded = Edit.load(edit.save(tmp_path / "edit.safetensors"), base, force=True)
        assert loaded.id == edit.id
        with edit:
            wanted = logits(base)
        with loaded:
            assert torch.equal(logits(base), wanted)


def test_edits_of_an_expert_add_up() -> None:
    base = base_of("mixtral")
    first, second = low_rank(base, (0,)), low_rank(base, (0, 1), seed=30)
    with first, second:
        both = outputs(base)
        first.rollback()
        alone = outputs(base)
    with second:
        assert torch.equal(outputs(base), alone)
    name = next(iter(first.factors))
    (a, b), (c, d) = first.factors[name], second.factors[name]
    rest = {n: f for n, f in second.factors.items() if n != name}
    joined = LowRankEdit(base, {name: (torch.cat([a, c]), torch.cat([b, d], dim=1)), **rest})
    with joined:
        torch.testing.assert_close(outputs(base), both, atol=1e-10, rtol=1e-10)
    assert not torch.equal(both, alone)


@pytest.mark.slow
def test_compiled_experts_are_edited() -> None:
    base = tiny_mixture("mixtral", torch.float32)
    plain, edit = logits(base), low_rank(base)
    with edit:
        wanted = logits(base)
    base.model.compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(logits(base), plain, atol=1e-4, rtol=1e-4)
        with edit:
            torch.testing.assert_close(logits(base), wanted, atol=1e-4, rtol=1e-4)


def test_all_experts_together_are_no_projection() -> None:
    base = base_of("mixtral")
    projection = mixture(base, 1)
    d_in, d_out = projection.shape
    factors = random(1, d_in, seed=0), random(d_out, 1, seed=0)
    with pytest.raises(UnsupportedUseError, match="one parameter with 4 experts; change single"):
        LowRankEdit(base, {projection.fused_name: factors})
    with pytest.raises(UnsupportedUseError, match=r"has no module .*down_proj\.4"):
        LowRankEdit(base, {projection.name_of(4): factors})


def test_experts_that_compute_something_else_are_left_alone() -> None:
    module = tiny_mixture("mixtral").module("model.layers.0.mlp.experts")
    forward = module.forward
    module.forward = lambda *args: torch.tanh(forward(*args))
    assert RoutedExperts.fits(module)
    assert routed_experts(module) is None
