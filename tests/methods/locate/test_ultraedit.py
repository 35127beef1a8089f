"""UltraEdit: the equations of the paper against dense ones, and statistics that live in edits."""

from __future__ import annotations

import pytest
import torch
from edit_kinds import answers
from support import REQUESTS, tiny_base

from kedit_lightning import BaseModel, Edit, EditRequest
from kedit_lightning.edits.projections import is_transposed
from kedit_lightning.errors import EditOrderError, UnsupportedUseError
from kedit_lightning.methods import UltraEdit
from kedit_lightning.methods.locate.ultraedit import (
    normalised,
    regress_normalised,
)
from kedit_lightning.methods.shared.moments import merge, moments
from kedit_lightning.methods.shared.published_settings import published_tables

pytestmark = pytest.mark.filterwarnings("ignore:UltraEdit has seen")
FACTS = [
    *REQUESTS,
    EditRequest("The capital of Peru is", "Warsaw in Poland"),
    EditRequest("Anna Weiss works in the city of", "Paris and Lyon"),
]


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 3 + 1


def whole(h: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Statistics of rows alone."""
    return moments(torch.cat([h, v], 1))


def product(h: torch.Tensor, v: torch.Tensor, lr: float = 1e-2) -> torch.Tensor:
    a, b = regress_normalised(h, v, whole(h, v), lr)
    return b @ a


def dense(h: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, lr: float) -> torch.Tensor:
    """The paper's formula as it stands; ``seen`` are all rows ``[h | v]`` so far."""
    both = (torch.cat([h, v], 1) - seen.mean(0)) / seen.std(0)
    keys, values = both[:, : h.shape[1]], both[:, h.shape[1] :]
    moves = -lr * (keys**2).sum(1, keepdim=True) * values
    return torch.linalg.solve(h.T @ h + torch.eye(h.shape[1]).to(h), h.T @ moves).T


# ---- arithmetic


@pytest.mark.parametrize("count", [6, 12, 30])
def test_both_forms_of_the_solution_agree(count):
    torch.manual_seed(0)
    h, v = rows(count, 12), rows(count, 7)
    a, b = regress_normalised(h, v, whole(h, v), 0.1)
    assert a.shape == (min(count, 12), 12)
    assert b.shape == (7, min(count, 12))
    torch.testing.assert_close(b @ a, dense(h, v, torch.cat([h, v], 1), 0.1))
    both = normalised(torch.cat([h, v], 1), whole(h, v))
    moves = -0.1 * both[:, :12].square().sum(1, keepdim=True) * both[:, 12:]
    left = h.T @ (h @ (b @ a).T - moves) + (b @ a).T
    assert left.abs().max() < 1e-10


def test_statistics_of_any_split_are_those_of_the_whole():
    torch.manual_seed(0)
    data = rows(50, 5)
    wanted = moments(data)
    for sizes in ([50], [1] * 50, [7, 20, 23], [49, 1]):
        parts = [moments(part) for part in data.split(sizes)]
        total = parts[0]
        for part in parts[1:]:
            total = merge(total, part)
        assert int(total[2]) == 50
        torch.testing.assert_close(total[:2], wanted[:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [10.0, 1e-9, 1e9])
def test_the_scale_of_the_loss_does_not_matter(scale):
    torch.manual_seed(0)
    h, v = rows(6, 12), rows(6, 7)
    torch.testing.assert_close(product(h, scale * v), product(h, v))


def test_the_change_is_linear_in_the_learning_rate():
    torch.manual_seed(0)
    h, v = rows(6, 12), rows(6, 7)
    torch.testing.assert_close(product(h, v, 0.2), 2 * product(h, v, 0.1))


def test_columns_that_do_not_vary_move_nothing():
    torch.manual_seed(0)
    h, v = rows(1, 12), rows(1, 7)
    for count in (1, 3, 7):
        # The mean of equal numbers may be off by rounding, which is no variation.
        assert not product(h.expand(count, -1), v.expand(count, -1)).any()
    h, v = rows(5, 12), rows(5, 7)
    h[:, 3], v[:, 2] = 0.1, 1e-7
    found = product(h, v)
    assert torch.isfinite(found).all()
    assert not found[2].any()
    assert found[[0, 1, 3, 4, 5, 6]].any(1).all()


# ---- the method, on live models


def capture_alone(base: BaseModel, requests: list[EditRequest], name: str) -> torch.Tensor:
    """Rows ``[h | v]`` of a projection at the answers' tokens, from plain autograd, one by one."""
    found, weight = [], base.model.get_parameter(f"{name}.weight").requires_grad_(True)
    for request in requests:
        row = base.encode(request.prompt, request.target_new)
        seen = {}

        def hook(module, args, output, seen=seen):
            output.retain_grad()
            seen["h"], seen["y"] = args[0], output

        handle = base.module(name).register_forward_hook(hook)
        logits = base.model(input_ids=torch.tensor([[*row.prompt, *row.answer]])).logits[0]
        handle.remove()
        at = slice(len(row.prompt) - 1, len(row.prompt) + len(row.answer) - 1)
        loss = torch.nn.functional.cross_entropy(
            logits[at], torch.tensor(row.answer), reduction="sum"
        )
        loss.backward()
        found.append(torch.cat([seen["h"][0, at], seen["y"].grad[0, at]], 1).detach())
    weight.requires_grad_(False)
    weight.grad = None
    return torch.cat(found)


def tolerance(family: str) -> dict[str, float]:
    """Llama's norms compute in float32, and normalising raises what rounding leaves."""
    return {"rtol": 1e-3, "atol": 1e-6} if family == "llama" else {"rtol": 1e-6, "atol": 1e-12}


def in_own_orientation(delta: torch.Tensor, base: BaseModel, name: str) -> torch.Tensor:
    return delta.T if is_transposed(base.module(name)) else delta


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_edits_in_a_row_follow_the_papers_formula(family):
    base = tiny_base(family)
    method = UltraEdit(base, lr=1e-2)
    method.configure_model()
    names = method.projections
    assert set(names) == set(base.layout.block(3).projections)
    seen: dict[str, torch.Tensor] = {}
    with base.edits.restored():
        for facts in (FACTS[:3], FACTS[3:5], FACTS[5:]):
            edit = method.edit(facts)
            deltas = edit.deltas()
            assert set(deltas) == {f"{name}.weight" for name in names}
            for name in names:
                new = capture_alone(base, facts, name)
                seen[name] = torch.cat([seen[name], new]) if name in seen else new
                d_in = edit.factors[name][0].shape[1]
                wanted = dense(new[:, :d_in], new[:, d_in:], seen[name], 1e-2)
                found = in_own_orientation(deltas[f"{name}.weight"], base, name)
                torch.testing.assert_close(found, wanted, **tolerance(family))
                assert found.abs().max() > 1e-3
            edit.apply()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_padding_and_rows_of_a_pass_change_nothing(family):
    base = tiny_base(family)
    wanted = UltraEdit(base, lr=1e-2).edit(FACTS).deltas()
    for side, size, pad in (("left", 10, 0), ("right", 4, 0), ("left", 1, 0), ("left", 10, 9)):
        base.padding_side = side
        base.tokenizer.pad_token_id, before = pad, base.tokenizer.pad_token_id
        found = UltraEdit(base, lr=1e-2, batch_size=size).edit(FACTS).deltas()
        base.tokenizer.pad_token_id = before
        for name, delta in wanted.items():
            torch.testing.assert_close(found[name], delta, rtol=1e-7, atol=1e-11)


def test_statistics_may_be_shared_by_shape_as_in_the_released_code():
    base = tiny_base("llama")
    gate, up, _ = base.layout.block(2).projections
    facts = FACTS[:5]
    new = {name: capture_alone(base, facts, name) for name in (gate, up)}
    own = UltraEdit(base, modules=[gate, up], lr=1e-2).edit(facts).deltas()
    legacy = UltraEdit(base, modules=[gate, up], lr=1e-2, legacy_shared_statistics=True)
    shared = legacy.edit(facts).deltas()
    for name in (gate, up):
        h, v = new[name].split([32, 48], dim=1)
        torch.testing.assert_close(own[f"{name}.weight"], dense(h, v, new[name], 1e-2))
        mixed = torch.cat([new[gate], new[up]])
        torch.testing.assert_close(shared[f"{name}.weight"], dense(h, v, mixed, 1e-2))
    assert not torch.allclose(own[f"{gate}.weight"], shared[f"{gate}.weight"], rtol=1e-2)


def test_a_single_token_gives_an_edit_of_zeros_and_a_warning():
    base = tiny_base("llama")
    with pytest.warns(UserWarning, match="has seen 1 answer tokens so far.*none at all"):
        edit = UltraEdit(base).edit(REQUESTS[1:2])
    assert not any(delta.any() for delta in edit.deltas().values())


def test_places_are_chosen_by_layer_or_by_name():
    base = tiny_base("llama")
    method = UltraEdit(base, layers=[0, -2])
    method.configure_model()
    blocks = base.layout.blocks
    assert method.projections == (*blocks[0].projections, *blocks[2].projections)
    with pytest.raises(UnsupportedUseError, match=r"'model\.norm'.*RMSNorm"):
        UltraEdit(base, modules=["model.norm"]).edit(FACTS)


def test_published_places_may_differ_by_projection(monkeypatch):
    base = tiny_base("llama")
    places = {"blocks": {0: [1, 2], -1: [2]}}
    monkeypatch.setitem(published_tables()["UltraEdit"], ("llama", 4, 32), places)
    blocks = base.layout.blocks
    (gate, *_), (gate_above, _, down) = blocks[1].projections, blocks[2].projections
    for layers, projections in ((None, (gate, gate_above, down)), ([0], blocks[0].projections)):
        method = UltraEdit(base, layers=layers)
        method.configure_model()
        assert method.projections == projections


# ---- statistics live in the edits


def test_rolling_back_and_applying_again_is_as_if_nothing_had_happened(tmp_path):
    base = tiny_base("gpt2")
    method = UltraEdit(base, lr=1e-2)
    with base.edits.restored():
        first = method.edit(FACTS[:3]).apply()
        after_first = answers(base)
        second = method.edit(FACTS[3:]).apply()
        after_second = answers(base)
        third = method.edit(FACTS[:2])
        second.rollback()
        assert torch.equal(answers(base), after_first)
        again = method.edit(FACTS[3:])
        assert again.id == second.id
        assert again.apply().state()[0].keys() == second.state()[0].keys()
        assert torch.equal(answers(base), after_second)
        assert method.edit(FACTS[:2]).id == third.id
        paths = [edit.save(tmp_path / edit.id) for edit in (first, again)]
    fresh = tiny_base("gpt2")  # as in another process
    with fresh.edits.restored():
        for path in paths:
            Edit.load(path, fresh).apply()
        assert torch.equal(answers(fresh), after_second)
        assert UltraEdit(fresh, lr=1e-2).edit(FACTS[:2]).id == third.id


def test_an_earlier_edit_that_left_is_forgotten():
    base = tiny_base("llama")
    method = UltraEdit(base, lr=1e-2)
    name = method.base.layout.block(3).down
    with base.edits.restored():
        first = method.edit(FACTS[:3]).apply()
        second = method.edit(FACTS[3:5]).apply()
        kept = tuple(second.memory[f"{name}.{part}"] for part in ("mean", "squares", "count"))
        first.rollback()
        third = method.edit(FACTS[5:])
        new = capture_alone(base, FACTS[5:], name)
        a, b = regress_normalised(new[:, :48], new[:, 48:], merge(kept, moments(new)), 1e-2)
        found = third.deltas()[f"{name}.weight"]
        torch.testing.assert_close(found, b @ a, **tolerance("llama"))
        second.rollback()
        with pytest.raises(EditOrderError, match="UltraEdit depends on the edits"):
            second.apply()
