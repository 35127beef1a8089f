"""InstructEdit: instructions, tasks left out of fit, checkpoints; the rest is MEND's."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from episode_support import EXAMPLES, batch_gradient, data
from fit_support import SaveEachStep, fit, state
from hypernetwork_support import SMALL
from places import ROOT, SAMPLES
from support import REQUESTS, TASKS, tiny_base

from kedit_lightning import EditBatch, EditRequest
from kedit_lightning.data import CounterFact, NanoFacts, Requests
from kedit_lightning.edits.edit import EditOrigin
from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError
from kedit_lightning.methods import MEND, InstructEdit
from kedit_lightning.methods.hypernetwork.shared import meta_gradient
from kedit_lightning.methods.hypernetwork.shared.outer_loss import outer_losses

WORDS = {**SMALL, "tasks": TASKS}


def instruct(base, kind=InstructEdit, **settings):
    """An untrained method, built, whose edits are large enough to be told apart."""
    given = {**(WORDS if kind is InstructEdit else SMALL), "edit_lr": 0.05, **settings}
    method = kind(base, checkpoint="none", **given)
    method.configure_model()
    return method


def tagged(tmp_path):
    """The data of MEND's tests, with tasks."""
    module = data(tmp_path)
    records = json.loads(Path(module.train_path).read_text())
    for record, request in zip(records, REQUESTS, strict=True):
        record["task"] = request.task
    Path(module.train_path).write_text(json.dumps(records))
    return module


# ---- instructions


def test_without_words_of_its_own_the_template_gives_mend_to_the_bit():
    base = tiny_base("gpt2")
    plain, mend = instruct(base, template="{prompt}"), instruct(base, MEND)
    for method in (plain, mend):
        method.outcome = batch_gradient(method, EditBatch(EXAMPLES))
    for a, b in zip(plain.outcome.gradients, mend.outcome.gradients, strict=True):
        assert torch.equal(a, b)
    deltas = [method.edit(REQUESTS).deltas() for method in (plain, mend)]
    assert all(torch.equal(delta, deltas[1][name]) for name, delta in deltas[0].items())


def test_an_edit_is_mends_for_the_request_behind_the_last_description():
    base = tiny_base("llama")
    request = REQUESTS[2]
    text = f"country! Say what country it is in. {request.prompt}"
    edit = instruct(base, template="{task}! {description} {prompt}").edit([request])
    wanted = instruct(base, MEND).edit([replace(request, prompt=text)]).deltas()
    other = instruct(base, MEND).edit([request]).deltas()
    for name, delta in edit.deltas().items():
        assert torch.equal(delta, wanted[name])
        assert not torch.allclose(delta, other[name], atol=1e-6)
    assert edit.origin.requests == (request,)


def test_names_of_tasks_are_read_as_words_and_braces_as_text():
    base = tiny_base("llama")
    tasks = {"birth_city": ["{task} or {prompt}?"]}
    method = instruct(base, tasks=tasks, template="{task}: {description} {prompt}")
    (read,) = method.instruct([EditRequest("The {town} is", "Rome", task="birth_city")])
    assert read.prompt == "birth city: {task} or {prompt}? The {town} is"


def test_fit_draws_another_description_in_each_epoch_and_never_that_of_edits(monkeypatch):
    method = instruct(tiny_base("llama"), template="{description} {prompt}")
    seen = []
    for epoch in range(4):
        monkeypatch.setattr(InstructEdit, "epoch", epoch)
        seen.append([r.prompt for r in method.instruct(REQUESTS, fitting=True)])
        assert seen[-1] == [r.prompt for r in method.instruct(REQUESTS, fitting=True)]
    assert seen[0] == seen[2] != seen[1] == seen[3]
    for number, request in enumerate(REQUESTS):
        own = {prompts[number].removesuffix(" " + request.prompt) for prompts in seen}
        assert own == set(TASKS[request.task][:-1])


def test_instructions_are_read_with_the_request_alone():
    base = tiny_base("gpt2")
    method, mend = instruct(base, own_wording=True), instruct(base, MEND, own_wording=True)
    episodes, plain = (m.episodes(EditBatch(EXAMPLES)) for m in (method, mend))
    for one, other in zip(episodes, plain, strict=True):
        assert (one.asked, one.kept) == (other.asked, other.kept)
        (request,), (own,) = one.requests, other.requests
        assert request.prompt.startswith("Task: ")
        assert request.prompt.endswith(f" Input: {own.prompt}")
        rows, bare = (base.rows([r.prompt], [r.target_new]) for r in (request, own))
        assert torch.equal(rows.answer_ids, bare.answer_ids)
        assert int(rows.prompt_end) > int(bare.prompt_end)


@pytest.mark.parametrize("template", ["{prompt} {task}", "{task}", "{prompt} {prompt}"])
def test_a_template_that_does_not_end_with_the_prompt_is_refused(template):
    with pytest.raises(UnsupportedUseError, match="at its end"):
        InstructEdit(tiny_base("llama"), template=template, tasks=TASKS).configure_model()


# ---- tasks


def test_requests_without_a_described_task_are_refused_before_the_model_is_loaded():
    method = InstructEdit("there/is-no-such-model", tasks=TASKS)
    with pytest.raises(MissingNeedsError, match="'tower' lacks 'task'"):
        method.edit([replace(REQUESTS[0], task=None)])
    with pytest.raises(MissingNeedsError, match=r"'tower' has task 'river'.*birth.*country"):
        method.edit([replace(REQUESTS[0], task="river")])
    river = replace(EXAMPLES[0], requests=(replace(REQUESTS[0], task="river"),))
    with pytest.raises(MissingNeedsError, match="river"):
        method.check_examples([river], fitting=True)
    method.check_examples(EXAMPLES, fitting=True)


def test_fit_learns_nothing_of_tasks_that_are_held_out(tmp_path):
    few = {name: TASKS[name] for name in ("city", "birth")}
    method = InstructEdit(
        tiny_base("llama"),
        **{**WORDS, "tasks": few, "accumulate": 1},
        held_out=["country"],
        vary_targets=True,
    )
    seen = []
    gradients = method.batch_gradients
    method.batch_gradients = lambda batch: seen.extend(method.episodes(batch)) or gradients(batch)
    fit(method, tmp_path, max_epochs=3, source=tagged(tmp_path))
    assert method.network.updates == len(seen) == 6
    assert {episode.requests[0].task for episode in seen} == {"city", "birth"}
    # "France" has the answer "Norway" in a record of a held-out task alone.
    assert "Norway" not in {episode.requests[0].target_new for episode in seen}


def test_the_rest_of_a_batch_is_learned_as_if_an_episode_that_is_not_finite_were_not_there(
    tmp_path, monkeypatch
):
    base, bad = tiny_base("llama"), REQUESTS[1]

    def spoil(base, episodes, *deltas):
        losses = outer_losses(base, episodes, *deltas)
        for number, episode in enumerate(episodes):
            if episode.requests[0].prompt.endswith(bad.prompt):
                losses.edit[number] = losses.edit[number] * math.nan
        return losses

    monkeypatch.setattr(meta_gradient, "outer_losses", spoil)
    method = InstructEdit(base, **{**WORDS, "accumulate": 4})
    fit(method, tmp_path, source=tagged(tmp_path))
    assert method.trainer.callback_metrics["train/skipped_episodes"] == 1
    assert (method.network.skipped, method.network.updates) == (1, 1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in method.state_dict().values())

    # statistics take in all rows, so the networks of this comparison have none
    plain = instruct(base, normalise=False)
    whole = batch_gradient(plain, EditBatch(EXAMPLES))
    rest = batch_gradient(plain, EditBatch([e for e in EXAMPLES if e.requests[0] != bad]))
    assert (whole.episodes, whole.skipped) == (3, 1)
    assert (rest.episodes, rest.skipped) == (3, 0)
    assert torch.allclose(whole.sums, rest.sums, atol=1e-12)
    for a, b in zip(whole.gradients, rest.gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert any(bool((gradient != 0).any()) for gradient in rest.gradients)


def test_data_carries_tasks(tmp_path):
    assert [e.requests[0].task for e in tagged(tmp_path).examples("train")] == [
        request.task for request in REQUESTS
    ]
    (one,) = Requests(prompt="Lyon is in", target_new="Peru", task="country").examples()
    assert one.requests[0].task == "country"
    nested = SAMPLES / "counterfact_nested.json"
    relations = [r["requested_rewrite"].get("relation_id") for r in json.loads(nested.read_text())]
    assert [e.requests[0].task for e in CounterFact(path=nested).examples()] == relations
    assert EditOrigin.from_json(EditOrigin(requests=REQUESTS).to_json()).requests == tuple(REQUESTS)
    bare = EditOrigin(requests=[EditRequest("Lyon is in", "Peru")])
    assert "task" not in bare.to_json()["requests"][0]
    assert EditOrigin.from_json(bare.to_json()) == bare


def test_the_config_describes_every_relation_of_nano_facts():
    root = ROOT
    config = yaml.safe_load((root / "configs/methods/instructedit.yaml").read_text())
    tasks = config["model"]["init_args"]["tasks"]
    splits = ("train", "validation", "test")
    found = {e.requests[0].task for split in splits for e in NanoFacts().examples(split)}
    assert found == set(tasks)
    lines = [line for descriptions in tasks.values() for line in descriptions]
    assert len(lines) == len(set(lines)) == 4 * len(tasks)


# ---- checkpoints, resume


def test_a_checkpoint_brings_its_template(tmp_path):
    base = tiny_base("llama")
    method = InstructEdit(base, **WORDS, template="About {task}: {prompt}")
    fit(method, tmp_path, source=tagged(tmp_path)).save_checkpoint(tmp_path / "i.ckpt")
    settings = {"checkpoint": str(tmp_path / "i.ckpt"), "tasks": TASKS}
    again = InstructEdit(base, **settings)
    edits = [m.edit(REQUESTS).deltas() for m in (method, again)]
    assert all(torch.equal(delta, edits[1][name]) for name, delta in edits[0].items())
    other = InstructEdit(
        base, checkpoint=str(tmp_path / "i.ckpt"), tasks=TASKS, template="{prompt}"
    )
    with pytest.raises(UnsupportedUseError, match=r"template 'About \{task\}: \{prompt\}', not"):
        other.configure_model()


def test_a_resumed_fit_equals_an_unbroken_one_step_for_step(tmp_path):
    base = tiny_base("gpt2")
    settings = {**WORDS, "held_out": ["city"]}
    whole = InstructEdit(base, **settings)
    fit(whole, tmp_path, None, 2, tagged(tmp_path), callbacks=[SaveEachStep(tmp_path)])
    assert whole.network.updates == 4
    wanted, loss = state(whole), batch_gradient(whole, EditBatch(EXAMPLES)).loss
    for stop in (1, 2, 3):
        rest = InstructEdit(base, **settings)
        fit(rest, tmp_path, tmp_path / f"{stop}.ckpt", 2, tagged(tmp_path))
        for name, tensor in state(rest).items():
            assert torch.equal(tensor, wanted[name]), (stop, name)
        assert torch.equal(batch_gradient(rest, EditBatch(EXAMPLES)).loss, loss)
