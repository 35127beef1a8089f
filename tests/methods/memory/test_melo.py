"""MELO: clusters of facts, blocks for single rows, and what training a block is."""

from __future__ import annotations

import pytest
import torch
from edit_kinds import blocks
from support import FAMILIES, REQUESTS, TEXT, tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.edits.kinds.blocks.clusters import GAP, BlockEntry, ClusterIndex
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import MELO

OTHERS = [text.split(".")[0] for text in TEXT]
QUICK = {"steps": 6, "lr": 0.1}


def melo(base, **settings):
    return MELO(base_model=base, **{**QUICK, **settings})


def answer_logits(base, requests=REQUESTS, **options):
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests], **options)
    return torch.where(rows.answer_mask[..., None], base.answer_logits(rows), 0)


# ---- clusters


def entry(*place, label=1, radius=1.0, block=0):
    return BlockEntry(torch.tensor(place, dtype=torch.float64), (label,), radius, block)


def lookup(index, *places):
    return index.table().lookup(torch.tensor(places, dtype=torch.float64)).tolist()


def test_clusters_are_new_grow_and_split():
    index = ClusterIndex(0.0)
    facts = [entry(0, 0), entry(1.5, 0), entry(9, 0, label=2), entry(2.5, 0, label=3)]
    assert [index.insert(fact) for fact in facts] == ["new", "grow", "new", "split"]
    first, second, third = index.clusters
    # Shrunk to half of 2.5 - 0.75, where both members lie just inside.
    assert first.centre.tolist() == [0.75, 0]
    assert first.radius == pytest.approx(0.875 - GAP, abs=1e-12)
    assert (second.radius, third.radius) == (1.0, 0.875)
    assert len(first.members) == 2


def test_centre_and_radius_are_those_of_all_members():
    keys = torch.randn(6, 4, dtype=torch.float64) / 4
    index = ClusterIndex.of([BlockEntry(key, (1,), 1.0, i) for i, key in enumerate(keys)], 0.0)
    (cluster,) = index.clusters
    torch.testing.assert_close(cluster.centre, keys.mean(0), rtol=0, atol=1e-12)
    farthest = float((keys - keys.mean(0)).norm(dim=1).max())
    assert cluster.radius == pytest.approx(max(farthest, 1.0), abs=1e-12)


def test_facts_that_are_pushed_out_stay_known():
    facts = [entry(0, 0), entry(1.8, 0, block=1), entry(0.9, 0.3, label=2, block=2)]
    index = ClusterIndex.of(facts, 0.0)
    assert len(index.clusters) == 3
    assert lookup(index, *[fact.key.tolist() for fact in facts]) == [0, 1, 2]
    assert lookup(index, [50, 50]) == [-1]


def test_a_query_gets_the_block_of_the_nearest_fact_of_its_cluster():
    index = ClusterIndex.of([entry(0, 0), entry(1, 0, block=1), entry(9, 9, label=2, block=2)], 0.0)
    assert lookup(index, [0.2, 0], [0.7, 0], [9.5, 9], [3, 0]) == [0, 1, 2, -1]


def test_a_fact_with_the_same_key_is_replaced():
    index = ClusterIndex(1e-6)
    facts = [entry(3, 4), entry(3.5, 4, block=1), entry(3, 4 + 1e-6, label=2, block=2)]
    assert [index.insert(fact) for fact in facts] == ["new", "grow", "split"]
    assert lookup(index, [3, 4], [3.5, 4]) == [2, 1]
    assert sum(len(cluster.members) for cluster in index.clusters) == 2


def test_a_key_is_recognised_within_rounding_whatever_the_radius():
    index = ClusterIndex.of([entry(3, 4, radius=0.0)], 1e-3)
    assert lookup(index, [3, 4.004], [3, 4.006]) == [0, -1]


# ---- rows


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_only_rows_in_a_cluster_change_and_the_others_not_by_a_bit(family, side):
    base = tiny_base(family, torch.float32)
    rows = base.rows([*OTHERS, REQUESTS[0].prompt], padding_side=side)
    before = base.forward(rows).logits
    with melo(base, radius=1e-3).edit(REQUESTS[:1]):
        after = base.forward(rows).logits
    assert torch.equal(after[:-1], before[:-1])
    assert not torch.allclose(after[-1], before[-1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_get_blocks_of_their_own(family):
    base = tiny_base(family)
    edit = melo(base, radius=1e-3, facts_per_block=1).edit(REQUESTS)
    assert edit.count == len(REQUESTS)
    with edit:
        mixed = answer_logits(base)
        for number, request in enumerate(REQUESTS):
            alone = answer_logits(base, [request])[0]
            torch.testing.assert_close(mixed[number, : len(alone)], alone, rtol=0, atol=1e-10)
        ends = list(reversed(REQUESTS))
        other = answer_logits(base, ends, padding_side="left")
        torch.testing.assert_close(other.flip(0), mixed, rtol=0, atol=1e-10)


def test_a_block_is_a_plain_low_rank_change_of_its_rows():
    base = tiny_base("llama")
    edit = blocks(base)
    ((module, factors),) = edit.blocks.items()
    rows = base.rows([OTHERS[0], REQUESTS[0].prompt])

    def put(layer, args, output):
        changed = output.clone()
        changed[1] += args[0][1] @ factors.a[1].T @ factors.b[1].T
        return changed

    handle = base.module(module).register_forward_hook(put)
    expected = base.forward(rows).logits
    handle.remove()
    with edit:
        torch.testing.assert_close(base.forward(rows).logits, expected, rtol=0, atol=1e-12)


# ---- training


def test_a_block_is_that_of_plain_lora():
    base, steps = tiny_base("llama"), 6
    method = melo(base, radius=1e3, scale=3.0, steps=steps)
    edit = method.edit(REQUESTS[:2])
    zero = melo(base, radius=1e3, scale=3.0, steps=0).edit(REQUESTS[:2])
    pairs = {name: (d.a[0].clone(), d.b[0].clone()) for name, d in zero.blocks.items()}
    assert all(not b.any() for _, b in pairs.values())
    leaves = [tensor.requires_grad_() for pair in pairs.values() for tensor in pair]
    rows = base.rows([r.prompt for r in REQUESTS[:2]], [r.target_new for r in REQUESTS[:2]])
    optimizer = torch.optim.Adam(leaves, lr=QUICK["lr"])
    for _ in range(steps):
        handles = [
            base.module(name).register_forward_hook(
                lambda module, args, output, a=a, b=b: output + 3 * args[0] @ a.T @ b.T
            )
            for name, (a, b) in pairs.items()
        ]
        log_probs = base.answer_log_probs(rows).sum(1) / rows.answer_mask.sum(1)
        for handle in handles:
            handle.remove()
        optimizer.zero_grad()
        (-log_probs.mean()).backward()
        optimizer.step()
    for name, (a, b) in pairs.items():
        torch.testing.assert_close(edit.blocks[name].a[0], a.detach(), rtol=0, atol=1e-8)
        torch.testing.assert_close(edit.blocks[name].b[0], 3 * b.detach(), rtol=0, atol=1e-8)


def test_groups_that_are_trained_together_get_the_blocks_they_get_alone():
    base = tiny_base("gpt2")
    method = melo(base)
    groups = [REQUESTS[:1], REQUESTS[1:3], REQUESTS[3:]]
    alone = [method.edit(group) for group in groups]
    for one, other in zip(method.edited(groups), alone, strict=True):
        for name, factors in one.blocks.items():
            for pair in zip(factors, other.blocks[name], strict=True):
                torch.testing.assert_close(*pair, rtol=0, atol=1e-9)


def test_a_correction_is_trained_without_the_block_that_it_replaces():
    base = tiny_base("llama")
    method = melo(base, radius=1e-3)
    changed = EditRequest(REQUESTS[0].prompt, "Berlin", "Eiffel Tower")
    fresh = method.edit([changed])
    with method.edit(REQUESTS[:1]):
        corrected = method.edit([changed])
        with corrected:
            after = answer_logits(base, [changed])
    for name, factors in fresh.blocks.items():
        assert torch.equal(factors.b, corrected.blocks[name].b)
    with fresh:
        torch.testing.assert_close(after, answer_logits(base, [changed]), rtol=0, atol=1e-12)


# ---- the stack


@pytest.mark.parametrize("gone", [0, 2])
def test_any_edit_may_go_and_the_others_answer_as_before(gone):
    base = tiny_base("gpt2")
    plain = answer_logits(base)
    method = melo(base, radius=1e-3)
    with base.edits.restored():
        edits = [method.edit([request]).apply() for request in REQUESTS]
        together = answer_logits(base)
        edits[gone].rollback()
        rest = answer_logits(base)
    kept = [i for i in range(len(REQUESTS)) if i != gone]
    assert torch.equal(rest[kept], together[kept])
    assert torch.equal(rest[gone], plain[gone])
    assert not torch.allclose(together[gone], plain[gone], atol=1e-3)


def test_blocks_of_edits_with_other_ranks_stand_side_by_side():
    base = tiny_base("llama")
    with base.edits.restored():
        first = melo(base, radius=1e-3, rank=1).edit(REQUESTS[:1]).apply()
        alone = answer_logits(base)
        melo(base, radius=1e-3, rank=3).edit(REQUESTS[1:2]).apply()
        both = answer_logits(base)
        torch.testing.assert_close(both[0], alone[0], rtol=0, atol=1e-12)
        assert not torch.allclose(both[1], alone[1], atol=1e-3)
        first.rollback()


def test_settings_that_cannot_be_are_refused():
    base = tiny_base("llama")
    with pytest.raises(UnsupportedUseError, match=r"above that of the keys.*layers \[1, 3\].*2"):
        MELO(base_model=base, key_layer=2, layers=[1, 3]).edit(REQUESTS[:1])
    default = MELO(base_model=base)
    default.configure_model()
    assert (default.settings.key_layer, default.settings.layers) == (2, [3])
