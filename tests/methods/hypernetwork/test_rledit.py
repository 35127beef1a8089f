"""RLEdit: trajectories of edits, what they cost, and the networks that learn from them."""

from __future__ import annotations

import pytest
import torch
from episode_support import EXAMPLES, batch_gradient, spoiled_losses
from fit_support import SaveEachStep, fit, state
from hypernetwork_support import rows_of
from malmen_support import SMALL_RLEDIT as SMALL
from malmen_support import check_ranks, cost, end_to_end, write
from malmen_support import stirred_rledit as stirred
from support import tiny_base

from kedit_lightning import EditBatch
from kedit_lightning.edits import EditOrigin
from kedit_lightning.methods import MALMEN, RLEdit
from kedit_lightning.methods.hypernetwork.shared import shift_gradient
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import shift_edit
from kedit_lightning.methods.hypernetwork.shared.shift_gradient import WeightedEpisodes

BATCH = EditBatch(EXAMPLES)


def same(found, wanted):
    assert torch.allclose(found.loss, wanted.loss, atol=1e-12)
    for a, b in zip(found.mean_gradients, wanted.mean_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_trajectory_of_one_chunk_is_a_step_of_malmen():
    shared = {"n_edits": 4, "projections": "down", "layers": [1, 2, 3], "c_loc": 1.0}
    base = tiny_base("llama")
    found = batch_gradient(stirred(base, trajectory=1, c_reg=0.0, **shared), BATCH)
    same(found, batch_gradient(stirred(base, MALMEN, **shared), BATCH))
    assert found.episodes == 4


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_size_and_locality_have_their_true_gradients(tokens):  # RLEDIT-1, RLEDIT-2
    base = tiny_base("gpt2")
    method = stirred(base, n_edits=4, tokens=tokens, c_loc=0.6)
    examples = method.draw_episodes(EXAMPLES, 1)
    parts, shifts = write(method, examples)
    found = cost(method, parts, shifts, [WeightedEpisodes(examples)], c_reg=0.3)
    loss, expected = end_to_end(method, examples, c_loc=0.6, c_reg=0.3)
    plain = cost(method, parts, shifts, [WeightedEpisodes(examples)])
    assert torch.allclose(found.loss, loss, atol=1e-12)
    for a, b, without in zip(found.mean_gradients, expected, plain.mean_gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-11)
        assert not torch.allclose(a, without, rtol=1e-4, atol=0)


def test_each_chunk_is_written_on_those_before_and_asked_with_them():
    base = tiny_base("llama")
    method, again = stirred(base, decay=0.5), stirred(base, decay=0.5)
    examples = again.draw_episodes(EXAMPLES, 1)
    first, second = examples[:2], examples[2:]
    parts, shifts = write(again, first)
    wanted = cost(again, parts, shifts, [WeightedEpisodes(first)], 0.3)
    with shift_edit(base, shifts.items(), False, EditOrigin()):
        parts, shifts = write(again, second)
        present = cost(
            again, parts, shifts, [WeightedEpisodes(second), WeightedEpisodes(first, 0.5)], 0.3
        )
        alone = cost(again, parts, shifts, [WeightedEpisodes(second)], 0.3)
        before = cost(again, parts, shifts, [WeightedEpisodes(first)])
    assert torch.allclose(present.loss, alone.loss + 0.5 * before.loss, atol=1e-12)
    found = batch_gradient(method, BATCH)
    same(found, wanted + present)
    assert float(found.loss) != pytest.approx(float(batch_gradient(again, BATCH).loss), abs=1e-6)


def test_a_decay_of_zero_and_a_depth_of_zero_ask_the_present_chunk_alone():
    base = tiny_base("llama")
    same(
        batch_gradient(stirred(base, decay=0.0), BATCH),
        batch_gradient(stirred(base, back_depth=0), BATCH),
    )
    deep = batch_gradient(stirred(base, n_edits=1, back_depth=1, decay=1.0), BATCH)
    deeper = batch_gradient(stirred(base, n_edits=1, back_depth=2, decay=1.0), BATCH)
    assert float(deeper.loss) > float(deep.loss)


def test_the_base_model_is_as_before_after_a_trajectory_and_after_an_error(monkeypatch):
    base = tiny_base("llama")
    inputs = rows_of(base).inputs
    before = base.model(**inputs).logits
    method = stirred(base)
    batch_gradient(method, BATCH)
    assert len(base.edits) == 0
    assert torch.equal(base.model(**inputs).logits, before)
    calls = []

    def fail(*args):
        calls.append(len(base.edits))
        if len(calls) == 2:
            raise ZeroDivisionError
        return outer_losses(*args)

    monkeypatch.setattr(shift_gradient, "outer_losses", fail)
    with pytest.raises(ZeroDivisionError):
        batch_gradient(method, BATCH)
    assert calls == [0, 1]
    assert torch.equal(base.model(**inputs).logits, before)


@pytest.mark.parametrize(("steps", "updates"), [(1, 1), (2, 2), (4, 4), (9, 4)])
def test_a_trajectory_has_the_steps_that_are_asked_for(tmp_path, steps, updates):
    method = RLEdit(
        tiny_base("llama"),
        **{**SMALL, "n_edits": 1, "trajectory": 4, "lr_end": 0.5},
        steps_per_trajectory=steps,
    )
    fit(method, tmp_path)
    assert method.network.updates == updates
    assert len(method.base.edits) == 0
    assert method.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_parts_of_a_trajectory_add_up_to_the_whole():
    base = tiny_base("llama")
    parts = list(stirred(base, steps_per_trajectory=2).batch_gradients(BATCH))
    assert [part.episodes for part in parts] == [2, 2]
    same(parts[0] + parts[1], batch_gradient(stirred(base), BATCH))


def test_a_chunk_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(shift_gradient, "outer_losses", spoiled_losses)
    base = tiny_base("llama")
    found = batch_gradient(stirred(base, n_edits=1, back_depth=0), BATCH)
    assert (found.episodes, found.skipped) == (3, 1)
    assert bool(torch.isfinite(found.loss))
    method = RLEdit(base, **{**SMALL, "back_depth": 0})
    fit(method, tmp_path)
    assert (method.network.skipped, method.network.updates) == (2, 1)
    assert method.trainer.callback_metrics["train/skipped_episodes"] == 2


def test_a_resumed_fit_equals_an_unbroken_one_step_for_step(tmp_path):
    base = tiny_base("gpt2")
    settings = {**SMALL, "n_edits": 1, "trajectory": 3, "steps_per_trajectory": 2, "lr_end": 0.2}
    whole = RLEdit(base, **settings)  # an epoch has a trajectory of three chunks, and one of one
    fit(whole, tmp_path, max_epochs=2, callbacks=[SaveEachStep(tmp_path)])
    saved = sorted(int(path.stem) for path in tmp_path.glob("*.ckpt"))
    assert len(saved) == 4
    assert whole.network.updates == saved[-1]
    for stop in saved[:-1]:
        rest = RLEdit(base, **settings)
        fit(rest, tmp_path, ckpt_path=tmp_path / f"{stop}.ckpt", max_epochs=2)
        wanted = state(whole)
        for name, tensor in state(rest).items():
            assert torch.equal(tensor, wanted[name]), (stop, name)


def settings_of_ranks(ranks):
    """Eight examples in trajectories of six and of two, whatever the number of ranks."""
    chunks = {"n_edits": 2 // ranks, "trajectory": 3, "steps_per_trajectory": 1}
    return {**SMALL, **chunks, "shift_size": "keys"}


@pytest.mark.slow
def test_two_ranks_end_equal_to_each_other_and_to_one_rank_on_all_the_data(tmp_path):
    check_ranks(tmp_path, "RLEdit", settings_of_ranks)
