"""The trainer from Python: what it returns, what it writes, and what it leaves alone."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SAMPLES, TESTS
from support import tiny_base, tiny_tokenizer
from toys import Learner, Toy

from kedit_lightning import BaseModel, Edit, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import CounterFact, Requests
from kedit_lightning.errors import (
    BaseModelMismatchError,
    DataFileError,
    EditFileError,
    NonFiniteError,
    NothingToFitError,
    ResumeError,
    UnsupportedUseError,
)
from kedit_lightning.metrics import EditMetrics

DATA = SAMPLES
FACTS = DATA / "facts.json"


def trainer(**settings: Any) -> EditTrainer:
    protocol = Protocol(**{"max_new_tokens": 4, **settings.pop("protocol", {})})
    return EditTrainer(accelerator="cpu", protocol=protocol, **settings)


def facts(limit: int | None = 3, **settings: Any) -> Requests:
    return Requests(path=FACTS, limit=limit, **settings)


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_form_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    weights = {n: t.clone() for n, t in base.model.state_dict().items()}
    data = CounterFact(path=DATA / "counterfact_nested.json", limit=2)
    (scores,) = trainer().test(Toy(base_model=base), data)
    assert scores["rewrite/tf_tok"] > 0
    assert {"locality/kl", "locality/neighborhood/keep_top1", "timing/edit_seconds"} <= set(scores)
    assert all(torch.equal(t, weights[n]) for n, t in base.model.state_dict().items())
    assert files(tmp_path) - {f for f in files(tmp_path) if f.startswith("cache/")} == set()


def test_output_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    data = CounterFact(path=DATA / "counterfact_nested.json", limit=3)
    base = tiny_base("llama")
    (scores,) = trainer().test(Toy(base_model=base), data, output=out, verbose=False)
    ids = [record["id"] for record in records(out)]
    assert files(out) == {
        ".lock",  # released, and left in place
        *("results.jsonl", "results.json", "results.csv", "report.html", "run.json", "stack.json"),
        *(f"edits/{id}.safetensors" for id in ids),
    }
    results = json.loads((out / "results.json").read_text())
    assert results["method"]["name"] == "Toy"
    assert results["method"]["settings"]["strength"] == 30.0
    assert results["base_model"]["fingerprint"] == base.fingerprint
    assert results["dataset"]["sha256"] == data.source["test"]["sha256"]
    assert results["dataset"]["path"] == str(DATA / "counterfact_nested.json")
    assert results["protocol"]["id"] == Protocol(max_new_tokens=4).id
    assert results["seed"] == 0
    assert results["versions"]["torch"] == torch.__version__
    # The numbers follow from the lines alone, and are those that were returned.
    again = EditMetrics.from_records(records(out)).compute()
    for key, entry in results["scores"].items():
        assert entry["mean"] == again[key] == pytest.approx(scores[key], rel=1e-6)
        assert entry["low"] <= entry["mean"] <= entry["high"]
    assert set(results["timing"]) == {"edit_seconds", "eval_seconds"}
    assert not any("seconds" in key or "peak" in key for key in results["scores"])
    rows = list(csv.DictReader(io.StringIO((out / "results.csv").read_text())))
    assert len(rows) == sum(len(record["probes"]) for record in records(out))
    assert rows[0]["prompt"] == records(out)[0]["probes"][0]["prompt"]


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_saved_edits_act_as_they_were_scored(mode: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = tiny_base("llama")
    method = Toy(base_model=base)
    run = trainer(protocol={"mode": mode, "chunk_size": 2})
    run.test(method, facts(), output=out, verbose=False)
    stack = json.loads((out / "stack.json").read_text())
    assert (stack["mode"], stack["fingerprint"]) == (mode, base.fingerprint)
    names = {"single": ["0", "1", "2"]}.get(mode, ["chunk-00000", "chunk-00001"])
    assert [e["file"] for e in stack["edits"]] == [f"edits/{n}.safetensors" for n in names]
    last = records(out)[2]
    edits = [Edit.load(out / entry["file"], base) for entry in stack["edits"]]
    for edit in edits if mode == "sequential" else edits[-1:]:
        edit.apply()
    assert base.edits[-1].id == last["edit_id"]
    probe = last["probes"][0]
    rows = base.rows([probe["prompt"]], [probe["answers"][0]])
    log_prob = base.answer_log_probs(rows).sum() / rows.answer_mask.sum()
    assert probe["after"]["log_prob"] == pytest.approx(float(log_prob), abs=1e-9)
    base.edits.clear()


def test_legacy_scoring(tmp_path: Path) -> None:
    data = CounterFact(path=DATA / "counterfact_nested.json", limit=2)
    run = trainer(protocol={"scoring": "legacy_easyedit"})
    (scores,) = run.test(Toy(base_model=tiny_base("llama")), data, output=tmp_path / "run")
    assert {"rewrite_acc", "rephrase_acc", "locality", "pre/rewrite_acc"} <= set(scores)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["scores"]["rewrite_acc"]["n"] == 2


def test_validate_and_fit(tmp_path: Path) -> None:
    method = Learner(base_model=tiny_base("llama"))
    data = facts(train_path=FACTS, val_path=FACTS)
    run = trainer(default_root_dir=tmp_path, max_epochs=1)
    run.fit(method, datamodule=data)
    assert "val/rewrite/tf_tok" in run.callback_metrics
    assert "val/rewrite/gen_em" not in run.callback_metrics  # no free answers while fitting
    (scores,) = trainer().validate(method, data)
    assert "val/rewrite/gen_em" in scores
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert set(content["state_dict"]) == {"net.weight", "net.bias"}


def test_fit_says_that_there_is_nothing_to_learn() -> None:
    with pytest.raises(NothingToFitError, match="Toy learns nothing"):
        trainer().fit(Toy(base_model="nosuch"), datamodule=facts())


@pytest.mark.parametrize("command", ["fit", "test", "validate", "edit"])
def test_data_is_asked_for(command: str) -> None:
    with pytest.raises(UnsupportedUseError, match=f"{command} was given no data"):
        getattr(trainer(), command)(Learner(base_model="nosuch"))


def test_needs_and_modes_are_checked_before_the_model_is_loaded() -> None:
    class Narrow(Toy):
        can = Toy.can.__class__(sequential=False)

    with pytest.raises(UnsupportedUseError, match="Narrow cannot keep earlier edits"):
        trainer(protocol={"mode": "sequential"}).test(Narrow(base_model="nosuch"), facts())
    with pytest.raises(UnsupportedUseError, match="add --output"):
        trainer().edit(Narrow(base_model="nosuch"), facts(), export="model")
    with pytest.raises(UnsupportedUseError, match="--export adapter"):
        trainer().edit(Narrow(base_model="nosuch"), facts(), export="adapter", output="x")


def test_nothing_computed_is_lost_when_an_example_fails(tmp_path: Path) -> None:
    out = tmp_path / "run"
    base = tiny_base("llama")
    method = Toy(base_model=base, fail_on="Namibia")
    with pytest.raises(NonFiniteError, match="request '2'") as caught:
        trainer().test(method, facts(), output=out)
    assert [record["id"] for record in records(out)] == ["0", "1"]
    assert f"--resume {out}" in caught.value.__notes__[-1]
    assert len(base.edits) == 0


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_bug_leaves_the_stack_as_it_was(mode: Any) -> None:
    base = tiny_base("llama")

    class Broken(Toy):
        def compute_edit(self, requests: Any) -> Edit:
            if "Namibia" in requests[-1].prompt:
                raise ZeroDivisionError
            return super().compute_edit(requests)

    with pytest.raises(ZeroDivisionError):
        trainer(protocol={"mode": mode}).test(Broken(base_model=base), facts())
    assert len(base.edits) == 0


def test_results_of_an_earlier_run_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    method = Toy(base_model=tiny_base("llama"))
    trainer().test(method, facts(1), output=out, verbose=False)
    before = (out / "results.jsonl").read_text()
    with pytest.raises(ResumeError, match="holds the results of an earlier run"):
        trainer().test(method, facts(1), output=out)
    assert (out / "results.jsonl").read_text() == before


def test_nan_weights_are_named(tmp_path: Path) -> None:
    base = tiny_base("llama")
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    try:
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight"):
            trainer().test(Toy(base_model=base), facts(1), output=tmp_path / "run")
    finally:
        fresh = tiny_base("llama").model.state_dict()
        base.model.load_state_dict(fresh)
    assert not (tmp_path / "run/results.jsonl").exists()


# ---- edit


def test_edit_returns_edits_that_are_rolled_back(tmp_path: Path) -> None:
    base = tiny_base("llama")
    method = Toy(base_model=base)
    alone = trainer(protocol={"mode": "single"})
    edits = alone.edit(method, facts())
    assert [edit.origin.requests[0].id for edit in edits] == ["0", "1", "2"]
    assert len(base.edits) == 0
    saved = alone.edit(method, facts(), output=tmp_path / "run")
    assert [edit.id for edit in saved] == [edit.id for edit in edits]


def test_edit_shows_answers_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    trainer().edit(Toy(base_model=tiny_base("llama")), facts())
    shown = capsys.readouterr().out
    assert "before" in shown
    assert "Amber Falls lies in" in shown
    assert "Anna Weiss" in shown


def test_export_of_a_model_and_of_an_adapter(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.model.config._name_or_path = ""
    method = Toy(base_model=base)
    run = trainer(protocol={"mode": "batch", "chunk_size": 3})
    (edit,) = run.edit(method, facts(), output=tmp_path / "a", export="model")
    run = trainer(protocol={"mode": "batch", "chunk_size": 3})
    run.edit(method, facts(), output=tmp_path / "b", export="adapter")
    rows = base.rows(["Amber Falls lies in"], ["Norway"])
    with edit:
        expected = base.answer_logits(rows)
    exported = BaseModel.load(str(tmp_path / "a/model"), dtype="float64")
    torch.testing.assert_close(exported.answer_logits(rows), expected)
    from kedit_lightning.edits.export import load_adapter

    with load_adapter(base, tmp_path / "b/adapter"):
        torch.testing.assert_close(base.answer_logits(rows), expected)


def test_export_of_edits_that_were_computed_apart_warns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 exported edits were computed apart"):
        trainer(protocol={"mode": "single"}).edit(
            Toy(base_model=tiny_base("llama")), facts(), output=tmp_path / "a", export="adapter"
        )


# ---- predict


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    base = tiny_base("llama")
    trainer().edit(Toy(base_model=base), facts(1), output=tmp_path / "run")
    return tmp_path / "run"


def test_predict_answers_with_and_without_edits(
    edited: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base("llama")
    (answer,) = trainer().predict(Toy(base_model=base), edits=edited, prompt="Amber Falls lies in")
    assert "Norway" in answer["edited"]
    assert "Norway" not in answer["base"]
    assert len(base.edits) == 0
    assert "1 edit applied" in capsys.readouterr().out
    (other,) = trainer().predict(
        Toy(base_model=base), edits=edited / "edits/0.safetensors", prompt="Amber Falls lies in"
    )
    assert other == answer


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.txt", "Rome is\n\nAmber Falls lies in\n"),
        ("q.json", '["Rome is", {"prompt": "Amber Falls lies in"}]'),
        ("q.jsonl", '{"prompt": "Rome is"}\n"Amber Falls lies in"\n'),
    ],
)
def test_predict_reads_prompts(edited: Path, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    answers = trainer().predict(
        Toy(base_model=tiny_base("llama")), edits=edited, prompts=tmp_path / name, verbose=False
    )
    assert [answer["prompt"] for answer in answers] == ["Rome is", "Amber Falls lies in"]


def test_predict_takes_prompts_from_data() -> None:
    answers = trainer().predict(Toy(base_model=tiny_base("llama")), facts(2), verbose=False)
    assert next(a["prompt"] for a in answers) == "Amber Falls lies in"
    assert all(a["base"] == a["edited"] for a in answers)


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '["ok", {"question": "x"}]', "[broken"])
def test_predict_refuses_files_without_prompts(tmp_path: Path, content: str) -> None:
    (tmp_path / "q.json").write_text(content)
    with pytest.raises(DataFileError, match=r"q\.json"):
        trainer().predict(Toy(base_model="nosuch"), prompts=tmp_path / "q.json")


def test_predict_says_what_is_missing(edited: Path, tmp_path: Path) -> None:
    method = Toy(base_model=tiny_base("llama"))
    with pytest.raises(UnsupportedUseError, match="no prompt"):
        trainer().predict(method, edits=edited)
    with pytest.raises(EditFileError, match=r"there is nothing at .*nothing.*--edits"):
        trainer().predict(method, edits=tmp_path / "nothing", prompt="x")
    with pytest.raises(EditFileError, match="there is nothing at"):
        trainer().predict(method, edits=edited / "edits/7.safetensors", prompt="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EditFileError, match="holds no saved edits"):
        trainer().predict(method, edits=tmp_path / "empty", prompt="x")
    (edited / "stack.json").unlink()
    with pytest.raises(EditFileError, match="finish it with --resume"):
        trainer().predict(method, edits=edited, prompt="x")


def test_edits_of_another_base_model_are_refused(edited: Path) -> None:
    with pytest.raises(BaseModelMismatchError, match=r"'llama'.*'gpt2'"):
        trainer().predict(Toy(base_model=tiny_base("gpt2")), edits=edited, prompt="Rome is")


def test_a_changed_edit_file_is_refused(edited: Path) -> None:
    method = Toy(base_model=tiny_base("llama"))
    method.edit(facts(2).examples()[1].requests).save(edited / "edits/0.safetensors")
    with pytest.raises(EditFileError, match="its content has changed; put back a copy"):
        trainer().predict(method, edits=edited, prompt="Rome is")


def test_usual_callbacks_give_way_to_those_that_are_given() -> None:
    from kedit_lightning.callbacks import EditTable, RollbackGuard

    own = EditTable(max_rows=3)
    tables = [c for c in trainer(callbacks=own).callbacks if isinstance(c, EditTable)]
    assert tables == [own]
    bare = trainer(usual_callbacks=False)
    assert not any(isinstance(c, RollbackGuard) for c in bare.callbacks)
    assert tiny_tokenizer(True).bos_token == "<s>"


TWO_PROCESSES = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from support import tiny_base
from toys import Toy
from kedit_lightning import EditTrainer
from kedit_lightning.data import CounterFact
from kedit_lightning.benchmark import Protocol

protocol = Protocol(mode={mode!r}, max_new_tokens=3)
devices = dict(accelerator="cpu", devices={devices}, strategy={strategy!r})
trainer = EditTrainer(protocol=protocol, **devices)
data = CounterFact(path={data!r})
trainer.test(Toy(base_model=tiny_base("llama")), data, output={output!r}, verbose=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_two_processes_score_each_example_once(mode: str, tmp_path: Path) -> None:
    found = []
    for devices, strategy in ((1, "auto"), (2, "ddp")):
        output = tmp_path / strategy
        script = tmp_path / f"{strategy}.py"
        code = TWO_PROCESSES.format(
            tests=str(TESTS),
            mode=mode,
            devices=devices,
            strategy=strategy,
            data=str(DATA / "counterfact_nested.json"),
            output=str(output),
        )
        script.write_text(code)
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = [{**r, "timing": None, "memory": None} for r in records(output)]
        results = json.loads((output / "results.json").read_text())
        found.append((sorted(lines, key=lambda r: (r["stage"], r["id"])), results["scores"]))
    assert found[0] == found[1]
