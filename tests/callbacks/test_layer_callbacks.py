"""Callbacks about layers: heat maps of causal traces, and the sweep for the best layer."""

from __future__ import annotations

import io
import json
from typing import Any, ClassVar

import pytest
import torch
from places import SAMPLES
from rich.console import Console
from support import tiny_base
from toys import Toy

from kedit_lightning import BaseModel, EditRequest, EditTrainer
from kedit_lightning.analysis.causal_trace import trace
from kedit_lightning.analysis.sweep import at_layer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.quality import judged
from kedit_lightning.benchmark.run_context import PromptBatch
from kedit_lightning.callbacks import CausalTracing, LayerSweep
from kedit_lightning.cli.main import main
from kedit_lightning.data import NanoFacts, Requests
from kedit_lightning.errors import (
    InvalidRequestError,
    MissingNeedsError,
    ModuleNotLocatedError,
    NonFiniteError,
    UnsupportedUseError,
)
from kedit_lightning.methods import FTM, MEND, ROME

FACTS = SAMPLES / "facts.json"
PROMPT = "The capital of France is"
NANO = ["--model=ROME", "--model.base_model=nano", "--trainer.accelerator=cpu"]


def trainer(**settings: Any) -> EditTrainer:
    return EditTrainer(
        accelerator="cpu", enable_model_summary=False, enable_progress_bar=False, **settings
    )


# ---- causal tracing


def test_predict_draws_and_names_the_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tracing = ["--trainer.callbacks+=CausalTracing", "--trainer.callbacks.subject=France"]
    main(["predict", *NANO, f"--prompt={PROMPT}", *tracing])
    said = capsys.readouterr().out
    (numbers,) = tmp_path.glob("traces/*.json")
    found = json.loads(numbers.read_text())
    picture = numbers.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"traces/{picture.name}" in said
    expected = trace(BaseModel.load("nano"), PROMPT, "France")
    assert found["restored"] == expected.restored.tolist()
    assert (found["answer"], found["edits"]) == ("Paris", [])
    assert f"p(Paris) is {expected.high:.3f}, and {expected.low:.3f} with noise" in said
    assert f"layer {expected.best_layer} brings back most" in said


def test_edits_are_traced_too_under_a_name_of_their_own(tmp_path):
    base = BaseModel.load("nano")
    edit = ROME(base_model=base).edit([EditRequest(PROMPT, "Lyon", subject="France")])
    method, run = Toy(base_model=base), trainer(callbacks=CausalTracing("France", folder=tmp_path))
    run.predict(method, prompt=PROMPT, verbose=False)
    run.predict(method, prompt=PROMPT, verbose=False, edits=edit.save(tmp_path / "f.safetensors"))
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {entry["answer"]: entry["edits"] for entry in found} == {"Paris": [], "Lyon": [edit.id]}


def test_requests_bring_their_own_subjects(tmp_path, capsys):
    callback = CausalTracing(kind="mlp", window=2, samples=2, folder=tmp_path)
    run = trainer(callbacks=callback, protocol=Protocol(max_new_tokens=2, chunk_size=2))
    run.predict(Toy(base_model=tiny_base("llama")), datamodule=Requests(path=FACTS, limit=2))
    found = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    subjects = ["".join(e["tokens"][e["subject"][0] : e["subject"][1] + 1]).strip() for e in found]
    assert subjects == ["Amber Falls", "Bolt & Reed"]
    assert {(entry["kind"], entry["window"]) for entry in found} == {("mlp", 2)}


def test_subjects_that_are_missing_or_wrong_are_named_before_anything_is_answered(tmp_path):
    method = Toy(base_model=tiny_base("llama"))
    with pytest.raises(MissingNeedsError, match=r"subject of prompt 'The capital.*callbacks.subj"):
        trainer(callbacks=CausalTracing(folder=tmp_path)).predict(method, prompt=PROMPT)
    callback = CausalTracing("Italy", folder=tmp_path)
    with pytest.raises(InvalidRequestError, match="'Italy' does not occur"):
        callback.on_predict_batch_start(trainer(), method, PromptBatch([PROMPT]), 0)
    assert list(tmp_path.iterdir()) == []


# ---- layer sweep


def sweep(**settings: Any) -> tuple[LayerSweep, io.StringIO]:
    shown = io.StringIO()
    return LayerSweep(**settings, console=Console(file=shown, width=120)), shown


def rome(base: BaseModel, **settings: Any) -> ROME:
    return ROME(base_model=base, statistics="identity", contexts=0, steps=3, **settings)


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_each_layer_scores_as_a_run_of_its_own_does(mode, tmp_path):
    base = tiny_base("llama")
    every = 1 if mode == "sequential" else None
    protocol = Protocol(mode=mode, chunk_size=2, generate=False, every=every)
    data = Requests(path=FACTS, limit=3)
    callback, _ = sweep()
    run = trainer(protocol=protocol, callbacks=callback)
    run.test(rome(base, layer=2), data, verbose=False, output=tmp_path / "run")
    own = json.loads((tmp_path / "run/results.json").read_text())["scores"]
    assert [entry["layer"] for entry in callback.found] == [0, 1, 2, 3]
    assert callback.found[2]["scores"] == own
    alone = rome(base, layer=0)
    trainer(protocol=protocol).test(alone, data, verbose=False, output=tmp_path / "alone")
    other = json.loads((tmp_path / "alone/results.json").read_text())["scores"]
    assert callback.found[0]["scores"] == other
    assert own != other, "equal layers prove nothing"
    assert callback.found[2] == {
        "layer": 2,
        **judged({k: v["mean"] for k, v in own.items()}),
        "scores": own,
    }
    written = json.loads((tmp_path / "run/layer_sweep.json").read_text())
    assert written == {"method": "ROME", "best": callback.best, "layers": callback.found}


def test_the_score_is_a_harmonic_mean_of_what_there_is_at_the_end():
    means = {
        "rewrite/tf_all": 1.0,
        "final/rewrite/tf_all": 0.5,
        "final/rephrase/tf_all": 0.25,
        "final/locality/keep_top1": 0.9,
        "after_2/rewrite/tf_all": 0.7,
    }
    found = judged(means)
    assert (found["rewrite"], found["rephrase"], found["known"]) == (0.5, 0.25, None)
    assert found["score"] == pytest.approx(3 / (2 + 4 + 1 / 0.9))
    found = judged({"rewrite/tf_all": means["rewrite/tf_all"]})
    assert (found["rewrite"], found["score"]) == (1.0, 1.0)
    scores = {"rewrite/tf_all": 1.0, "locality/known": 0.0, "locality/keep_top1": 1.0}
    assert judged(scores)["score"] == 0.0
    assert judged({})["score"] is None
    legacy = {"rewrite_acc": 0.5, "pre/rewrite_acc": 0.0, "locality": 1.0, "locality/a_acc": 0.0}
    found = judged(legacy)
    assert (found["rewrite"], found["kept"], found["score"]) == (0.5, 1.0, pytest.approx(2 / 3))


def test_on_nano_the_best_layer_is_found(capsys):
    base = BaseModel.load("nano")
    callback, shown = sweep(layers=[1, 5])
    run = trainer(protocol=Protocol(generate=False), callbacks=callback)
    method = ROME(base_model=base, contexts=2)
    run.validate(method, NanoFacts(limit=3, seed=0), verbose=False)
    early, last = callback.found
    # The last block comes too late to say it: nothing is written and nothing harmed.
    assert early["rewrite"] == 1.0
    assert (last["rewrite"], last["known"], last["score"]) == (0.0, 1.0, 0.0)
    rewrite, rephrase, known = (early[name] for name in ("rewrite", "rephrase", "known"))
    assert early["score"] == pytest.approx(3 / (1 / rewrite + 1 / rephrase + 1 / known))
    assert callback.best == 1
    table = shown.getvalue()
    (best,) = [line for line in table.splitlines() if line.rstrip(" │").endswith("best")]
    assert best.split("│")[1].strip() == "1"
    assert "ROME, layer by layer (validation)" in table


class Breaks(ROME):
    """Refuses to write at layer 1."""

    tried: ClassVar[list[int]] = []

    def compute_edit(self, requests: Any) -> Any:
        self.tried.append(self.hparams["layer"])
        if self.hparams["layer"] == 1:
            raise NonFiniteError("the update of layer 1 is infinite")
        return super().compute_edit(requests)


def test_a_layer_that_cannot_be_edited_is_named_and_the_others_are_measured():
    callback, shown = sweep(layers=[1, 3, 1])
    method = Breaks(base_model=tiny_base("llama"), layer=0, statistics="identity", contexts=0)
    run = trainer(protocol=Protocol(generate=False), callbacks=callback)
    run.test(method, Requests(path=FACTS, limit=1), verbose=False)
    assert callback.found[0] == {"layer": 1, "error": "the update of layer 1 is infinite"}
    assert callback.best == 3
    assert "layer 1: the update of layer 1 is infinite" in shown.getvalue()
    assert Breaks.tried == [1, 3, 0], "each layer once, then the run's own"


def test_data_without_rephrases_and_the_scores_of_easyedit_have_a_score_too():
    base = tiny_base("llama")
    for scoring in ("default", "legacy_easyedit"):
        callback, _ = sweep(layers=[0])
        run = trainer(protocol=Protocol(generate=False, scoring=scoring), callbacks=callback)
        data = Requests(prompt="Amber Falls lies in", subject="Amber Falls", target_new="Norway")
        run.test(rome(base), data, verbose=False)
        (entry,) = callback.found
        assert [entry[name] for name in ("rephrase", "known", "kept")] == [None] * 3
        assert entry["score"] == entry["rewrite"] is not None


def test_the_method_keeps_its_settings_at_another_layer():
    base = tiny_base("llama")
    moved = at_layer(rome(base, layer=0, lr=0.25), 3)
    assert type(moved) is ROME
    assert moved.base is base
    assert {**moved.hparams} == {**rome(base, layer=3, lr=0.25).hparams}
    single = at_layer(FTM(base_model=base, layers=[0, 1], lr=0.25), 2)
    assert (single.hparams["layers"], single.hparams["lr"]) == ([2], 0.25)
    built = FTM(base_model=base, layers=[0])
    built.configure_model()  # settings that are left to the base model are now those of layer 0
    assert built.settings != built.given
    assert at_layer(built, 2).given == FTM(base_model=base, layers=[2]).given


def test_what_cannot_be_swept_is_refused():
    base = tiny_base("llama")
    data = Requests(path=FACTS, limit=1)
    for method, said in (
        (Toy(base_model="nosuch"), "Toy has no setting for the layer"),
        (MEND(base_model=base), "MEND has learned belongs to its own layers"),
    ):
        with pytest.raises(UnsupportedUseError, match=said):
            trainer(callbacks=sweep()[0]).test(method, data, verbose=False)
    with pytest.raises(ModuleNotLocatedError, match="layer 4 does not exist"):
        trainer(callbacks=sweep(layers=[0, 4])[0]).test(rome(base), data, verbose=False)
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(UnsupportedUseError, match="from a data module"):
        trainer(callbacks=sweep()[0]).test(rome(base), loader, verbose=False)
    with pytest.raises(UnsupportedUseError, match="`kedit validate` or `kedit test` only"):
        trainer(callbacks=sweep()[0]).predict(Toy(base_model=base), prompt=PROMPT)


def test_it_is_named_on_the_command_line(capsys):
    data = ["--data=NanoFacts", "--data.limit=1", "--trainer.protocol.generate=false"]
    method = [*NANO, "--model.contexts=0", "--model.steps=1"]
    layers = ["--trainer.callbacks+=LayerSweep", "--trainer.callbacks.layers=[0]"]
    main(["validate", *method, *data, *layers])
    assert "ROME, layer by layer (validation)" in capsys.readouterr().out
