"""LocFT-BF: epochs over all facts, the end of text, the place, and the buffer of a stream."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.errors import ModuleNotLocatedError, UnsupportedUseError
from kedit_lightning.methods import FTM, LocFTBF
from kedit_lightning.methods.finetune.shared.fine_tuning import fine_tune
from kedit_lightning.methods.shared.answer_passes import AnswerPasses

QUICK = {"lr": 1e-2, "steps": 4}


def losses(base, requests=REQUESTS):
    with torch.no_grad():
        return AnswerPasses.of(base, requests, [base.layout.block(0).down]).losses()


def test_without_a_buffer_it_is_ft_m_with_the_end_of_text_at_a_late_place():
    base = tiny_base("llama")
    found = LocFTBF(base_model=base, **QUICK).edit(REQUESTS).deltas()
    settings = {"layers": [2], "batch_size": 8, "eos_in_target": True}
    expected = FTM(base_model=base, **QUICK, **settings).edit(REQUESTS).deltas()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_projections_are_chosen_by_their_names_inside_the_block():
    base = tiny_base("llama")
    chosen = ["mlp.up_proj", "self_attn.o_proj"]
    one = LocFTBF(base_model=base, layers=[1, -1], modules=chosen, **QUICK).edit(REQUESTS[:1])
    several = LocFTBF(base_model=base, layers=[1, -1], modules=chosen, **QUICK).edit(REQUESTS)
    for edit in (one, several):
        assert list(edit.deltas()) == [
            f"model.layers.{layer}.{name}.weight" for layer in (1, 3) for name in chosen
        ]
        assert all(bool(delta.any()) for delta in edit.deltas().values())


def test_a_block_that_does_not_exist_is_refused_whatever_is_trained_in_it():
    for modules in (None, ["mlp.up_proj"]):
        with pytest.raises(ModuleNotLocatedError, match="layer 9 does not exist"):
            LocFTBF(base_model=tiny_base("llama"), layers=[9], modules=modules).edit(REQUESTS)


@pytest.mark.parametrize("given", [{"modules": []}, {"modules": ["mlp.absent"]}, {"replay": -1}])
def test_refuses_what_it_cannot_do(given):
    with pytest.raises(UnsupportedUseError, match=r"modules|absent|replay"):
        LocFTBF(base_model=tiny_base("llama"), **given).edit(REQUESTS)


# ---- the buffer


def test_an_epoch_has_all_rows_and_draws_others_anew():
    tensors, seen = [torch.zeros(2, requires_grad=True)], []

    def loss_of(indices):
        seen.append(indices)
        return (tensors[0] - 1).square().sum()

    order = torch.Generator().manual_seed(0)
    fine_tune(tensors, 3, loss_of, order, lr=1e-3, epochs=4, batch_size=9, buffer=20, replay=4)
    assert all(batch[:3] == [0, 1, 2] and len(batch) == 7 for batch in seen)
    drawn = [tuple(batch[3:]) for batch in seen]
    assert len(set(drawn)) == 4
    assert all(3 <= index < 23 for batch in drawn for index in batch)
    fine_tune(tensors, 3, loss_of, order, lr=1e-3, epochs=1, batch_size=9, buffer=2, replay=4)
    assert seen[-1] == [0, 1, 2, 3, 4]  # a small buffer is rehearsed whole


def test_what_was_written_earlier_is_rehearsed():
    base = tiny_base("gpt2")
    first, second = REQUESTS[:2], REQUESTS[2:]
    kept = {}
    for replay in (0, 4):
        method = LocFTBF(base_model=base, lr=1e-2, steps=40, batch_size=2, replay=replay)
        with base.edits.restored():
            method.edit(first).apply()
            method.edit(second).apply()
            kept[replay] = losses(base, first).mean()
    assert kept[4] < kept[0] - 0.5


def test_the_buffer_holds_what_still_stands():
    base = tiny_base("llama")
    method = LocFTBF(base_model=base, **QUICK)
    corrected = EditRequest(REQUESTS[0].prompt, "Oslo", REQUESTS[0].subject)
    with base.edits.restored():
        first = method.edit(REQUESTS[:2]).apply()
        FTM(base_model=base, layers=[1], **QUICK).edit(REQUESTS[2:3]).apply()
        second = method.edit([corrected]).apply()
        assert method.earlier(REQUESTS[3:]) == [REQUESTS[1], corrected]
        assert method.earlier([REQUESTS[0]]) == [REQUESTS[1]]
        assert method.earlier([corrected]) == [REQUESTS[1]]
        assert second.origin.requests == (corrected,)
        second.rollback()
        assert method.earlier(REQUESTS[3:]) == REQUESTS[:2]
        first.rollback()
        assert method.earlier(REQUESTS[3:]) == []


def test_edits_apart_from_each_other_rehearse_what_is_on_the_stack():
    base = tiny_base("llama")
    method = LocFTBF(base_model=base, **QUICK)
    with method.edit(REQUESTS[:2]):
        for edit, request in zip(
            method.edit_each([[r] for r in REQUESTS[2:]]), REQUESTS[2:], strict=True
        ):
            alone = method.edit([request])
            assert edit.id == alone.id
        bare = LocFTBF(base_model=base, replay=0, **QUICK).edit(REQUESTS[3:])
    assert not torch.equal(*(next(iter(e.deltas().values())) for e in (alone, bare)))
