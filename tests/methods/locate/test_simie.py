"""SimIE: a row of edits equals one joint regression, whatever is rolled back in between."""

from __future__ import annotations

import pytest
import torch
from edit_kinds import answers, factors, origin_of, remembering
from support import REQUESTS, tiny_base

from kedit_lightning import Edit
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.errors import EditOrderError, UnsupportedUseError
from kedit_lightning.methods.locate.shared.least_squares import (
    ridge_update,
    size_prior,
    with_history,
)
from kedit_lightning.methods.locate.simie import simie, subject_keys

LAM = 3.0


def keys(size: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, count, generator=generator, dtype=torch.float64)


def host(base, seed: int) -> LowRankEdit:
    """An edit of two projections as a method would have computed it on the stack."""
    names = [base.layout.block(i).down for i in (1, 2)]
    pairs = {name: factors(base, name, seed=seed + i) for i, name in enumerate(names)}
    return LowRankEdit(base, pairs, origin_of(base, method="ROME", stack=base.edits.ids))


def step(base, seed: int, count: int = 4, **options) -> LowRankEdit:
    edit = host(base, seed)
    own = {name: keys(a.shape[1], count, seed) for name, (a, _) in edit.factors.items()}
    return simie(edit, own, lam=LAM, **options)


@pytest.mark.parametrize("count", [4, 30])  # together fewer, and more, keys than d_in
def test_a_row_of_edits_is_one_joint_regression(count):
    base = tiny_base("llama")
    name = base.layout.block(1).down
    start = base.module(name).weight.double()
    now, gram, wanted = start, LAM * torch.eye(48).double(), LAM * start
    with base.edits.restored():
        for seed in (10, 20, 30):
            a, b = host(base, seed).factors[name]
            k = keys(48, count, seed)
            gram = gram + k @ k.T
            wanted = wanted + (now + b @ a) @ k @ k.T
            edit = step(base, seed, count).apply()
            now = now + edit.deltas()[f"{name}.weight"]
            torch.testing.assert_close(now, wanted @ torch.linalg.inv(gram))


def test_the_update_along_keys_is_that_of_the_whole_system():
    own, earlier = keys(12, 3, 0), keys(12, 20, 1)
    for m in (0, 5, 9, 20):
        h = earlier[:, :m]
        wanted = torch.linalg.solve(2.0 * torch.eye(12) + h @ h.T + own @ own.T, own)
        prior = with_history(size_prior(2.0), h)
        a, b = ridge_update(own, torch.eye(3, dtype=torch.float64), prior, eps=1.0)
        torch.testing.assert_close((b @ a).T, wanted)


def test_a_history_may_be_given():
    base = tiny_base("llama")
    with base.edits.restored():
        first = step(base, 1).apply()
        from_stack = step(base, 2)
        given = {name.removesuffix(".keys"): held for name, held in first.memory.items()}
        assert step(base, 2, history=given).id == from_stack.id
        assert step(base, 2, history={}).id != from_stack.id


def test_a_heavy_weight_keeps_the_old_and_a_light_one_the_hosts_outputs():
    base = tiny_base("llama")
    edit = host(base, 1)
    (name, (a, b)), *_ = edit.factors.items()
    own = {other: keys(48, 4, 5) for other in edit.factors}
    light, heavy = (simie(edit, own, lam=lam).deltas() for lam in (1e-9, 1e9))
    torch.testing.assert_close(light[f"{name}.weight"] @ own[name], b @ a @ own[name])
    assert heavy[f"{name}.weight"].abs().max() < 1e-5


def test_keys_are_read_at_the_subjects_last_token():
    base = tiny_base("gpt2")
    name = base.layout.block(1).down
    found = subject_keys(base, [name], REQUESTS)[name]
    assert found.shape == (128, len(REQUESTS))
    for i, request in enumerate(REQUESTS):
        row = base.encode(request.prompt, subject=request.subject)
        seen = []
        handle = base.module(name).register_forward_hook(lambda m, x, y, seen=seen: seen.append(x))
        base.model(torch.tensor([row.prompt]))
        handle.remove()
        torch.testing.assert_close(found[:, i], seen[0][0][0, row.subject_end])


def test_rolling_back_and_applying_again_is_as_if_nothing_had_happened(tmp_path):
    base = tiny_base("llama")
    with base.edits.restored():
        first, second = step(base, 1).apply(), step(base, 2).apply()
        edited, third = answers(base), step(base, 3)
        second.rollback()
        assert step(base, 2).id == second.id
        second.apply()
        assert torch.equal(answers(base), edited)
        assert step(base, 3).id == third.id
        first.rollback()
        assert step(base, 3).id != third.id
        paths = [edit.save(tmp_path / edit.id) for edit in (first, second)]
    fresh = tiny_base("llama")
    with fresh.edits.restored():
        for path in paths:
            Edit.load(path, fresh).apply()
        assert step(fresh, 3).id == third.id
        assert torch.equal(answers(fresh), edited)


def test_what_it_cannot_do_is_said():
    base = tiny_base("llama")
    edit = host(base, 1)
    some = {base.layout.block(1).down: keys(48, 4, 0)}
    with pytest.raises(UnsupportedUseError, match=r"every edited.*layers\.2\.mlp\.down_proj are"):
        simie(edit, some)
    with_memory = remembering(base, method="AlphaEdit")
    own = {name: keys(48, 4, 0) for name in with_memory.factors}
    with pytest.raises(UnsupportedUseError, match="by AlphaEdit remembers facts"):
        simie(with_memory, own)
    with step(base, 1), pytest.raises(EditOrderError, match="another stack"):
        simie(edit, own)
