"""What a trainer attaches to a method, and the callbacks that are told of edits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from places import ROOT, SAMPLES
from support import tiny_base
from toys import Learner, Toy

from kedit_lightning import Edit, EditExample, EditRequest, EditTrainer, Probe
from kedit_lightning.benchmark import EditCallback, Protocol, RunContext
from kedit_lightning.benchmark.run_context import new_metrics
from kedit_lightning.data import Requests
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import ROME
from kedit_lightning.methods.method import MethodSettings

FACTS = SAMPLES / "facts.json"
SHORT = Protocol("single", chunk_size=2, evaluate="immediate", generate=False)


def trainer(**settings: Any) -> EditTrainer:
    return EditTrainer(accelerator="cpu", protocol=SHORT, enable_progress_bar=False, **settings)


def plain_trainer(**settings: Any) -> pl.Trainer:
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(accelerator="cpu", inference_mode=False, **off, **settings)


class Listener(EditCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.edits: list[tuple[str, str]] = []
        self.records: list[tuple[str, str | None]] = []
        self.full: list[Any] = []
        self.run: RunContext | None = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.run = pl_module.run

    def on_edit(self, trainer: Any, method: Any, name: str, edit: Edit) -> None:
        self.edits.append((name, edit.id))

    def on_example_result(self, trainer: Any, method: Any, record: Any, edit: Edit | None) -> None:
        self.records.append((record["id"], edit and edit.id))
        self.full.append(record)


# ---- the context


def test_answers_are_compared_by_the_protocols_rule(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"prompt": "Pi is", "subject": "Pi", "target_new": "3.5"}]))
    scores = {}
    for rule in ("words", "squad"):
        listener = Listener()
        protocol = Protocol(max_new_tokens=1, answers=rule)
        EditTrainer(accelerator="cpu", protocol=protocol, callbacks=listener).test(
            Toy(base_model=tiny_base("llama")), Requests(path=path), verbose=False
        )
        (record,) = listener.full
        (probe,) = record["probes"]
        probe["after"]["text"] = " 35"
        scores[rule] = type(new_metrics(protocol)).from_records([record]).compute()
    assert scores["words"]["rewrite/gen_em"] == scores["words"]["rewrite/gen_contains"] == 0
    assert scores["squad"]["rewrite/gen_em"] == scores["squad"]["rewrite/gen_contains"] == 1
    losses = {rule: scores[rule]["rewrite/inflation"] for rule in scores}
    assert losses["words"] - losses["squad"] == 1


def test_the_trainer_attaches_the_run_and_takes_it_back(tmp_path: Path) -> None:
    listener, data = Listener(), Requests(path=FACTS, limit=3)
    method = Toy(base_model=tiny_base("llama"))
    pl.seed_everything(5)
    trainer(callbacks=listener).edit(method, data, output=tmp_path / "run")
    run = listener.run
    assert run is not None
    assert (run.protocol, run.seed, run.data, run.editing) == (SHORT, 5, data, True)
    assert run.source("test")["sha256"] == data.source["test"]["sha256"]
    assert run.saved is None
    assert (data.chunk_size, data.deals_out_chunks) == (2, True)
    assert (method.run.data, method.run.editing) == (None, False)
    assert [name for name, _ in listener.edits] == ["0", "1", "2"]
    assert listener.records == [(name, edit) for name, edit in listener.edits]
    pl.seed_everything(0)


def test_a_resumed_run_tells_only_what_is_new(tmp_path: Path) -> None:
    method, data = Toy(base_model=tiny_base("llama")), Requests(path=FACTS, limit=3)
    trainer().test(method, data, output=tmp_path / "run", verbose=False)
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    (tmp_path / "run/results.jsonl").write_text("\n".join(lines[:2]) + "\n")
    listener = Listener()
    run = trainer(callbacks=listener)
    run.test(method, data, resume=tmp_path / "run", verbose=False)
    assert listener.edits == []
    assert [id for id, _ in listener.records] == ["2"]
    assert listener.run is not None
    assert listener.run.saved is not None


def test_under_another_trainer_the_protocol_is_the_default_one() -> None:
    method, data = Toy(base_model=tiny_base("llama")), Requests(path=FACTS, limit=2)
    trainer().test(method, data, verbose=False)
    with pytest.warns(
        UserWarning, match="Listener is told of edits by kedit_lightning.EditTrainer"
    ):
        (scores,) = plain_trainer(callbacks=[Listener()]).test(method, datamodule=data)
    assert (data.chunk_size, method.run.protocol, method.run.data) == (32, Protocol(), data)
    (same,) = EditTrainer(accelerator="cpu").test(method, data, verbose=False)
    assert scores["rewrite/tf_tok"] == same["rewrite/tf_tok"]


def test_modules_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedUseError, match="LightningModule is no editing method"):
        trainer().test(pl.LightningModule(), Requests(path=FACTS))


def test_no_attribute_is_looked_up_by_name_on_a_trainer() -> None:
    for folder in (ROOT / "src", ROOT / "callbacks"):
        for path in folder.rglob("*.py"):
            assert not re.search(r"getattr\((self\.)?_?trainer,", path.read_text()), path


# ---- callbacks


def test_a_misspelt_hook_is_an_error_where_the_class_is_defined() -> None:
    with pytest.raises(
        UnsupportedUseError, match=r"defines on_exmple_result.*on_example_result mea"
    ):

        class Misspelt(EditCallback):
            def on_exmple_result(self) -> None: ...

    with pytest.raises(
        UnsupportedUseError, match=r"defines on_test_strat.*was on_test_start meant"
    ):

        class Other(Listener):
            def on_test_strat(self) -> None: ...


def test_a_plain_callback_with_an_edit_hook_is_refused() -> None:
    class Plain(pl.Callback):
        def on_edit(self, *args: Any) -> None: ...

    with pytest.raises(UnsupportedUseError, match=r"Plain defines on_edit.*EditCallback"):
        trainer(callbacks=Plain())


def test_only_callbacks_with_an_edit_hook_depend_on_the_trainer() -> None:
    class Child(Listener):
        pass

    class Quiet(EditCallback):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None: ...

    assert (Child.takes_edits, Quiet.takes_edits) == (True, False)


# ---- what is written


@dataclass(frozen=True)
class DeepSettings(MethodSettings):
    depth: int | None


class Deep(Toy):
    """Leaves a setting to the base model."""

    settings_type = DeepSettings
    settings: DeepSettings

    def __init__(self, depth: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)

    def build(self) -> None:
        self.settings = replace(self.settings, depth=7)


def test_results_name_settings_as_given_and_as_used(tmp_path: Path) -> None:
    method = Deep(base_model=tiny_base("llama"))
    trainer().test(method, Requests(path=FACTS, limit=1), output=tmp_path / "run", verbose=False)
    found = json.loads((tmp_path / "run/results.json").read_text())["method"]
    assert found["settings"]["depth"] is None
    assert found["resolved"] == {"seed": 0, "depth": 7}
    kept = json.loads((tmp_path / "run/run.json").read_text())["method"]
    assert kept == {key: found[key] for key in ("name", "settings", "learned")}


def test_checkpoints_name_the_public_class(tmp_path: Path) -> None:
    for method, path in (
        (ROME(base_model=tiny_base("llama")), "kedit_lightning.methods.ROME"),
        (Learner(base_model=tiny_base("llama")), "toys.Learner"),
    ):
        run = plain_trainer()
        run.strategy.connect(method)
        run.save_checkpoint(tmp_path / "one.ckpt")
        content = torch.load(tmp_path / "one.ckpt", weights_only=True)
        assert content["hyper_parameters"]["_class_path"] == path


class Pictures(Requests):
    """Facts of a file, of which one is asked about with a picture."""

    def parse(self, fields: Any, id: str) -> EditExample:
        example = super().parse(fields, id)
        probe = Probe("locality", "The picture shows", image="tower.png")
        return replace(example, probes=(*example.probes, probe)) if id == "0" else example


@pytest.mark.parametrize("kind", [Toy, Learner])
def test_pictures_are_refused_where_nothing_reads_them(kind: type[Toy]) -> None:
    method = kind(base_model=tiny_base("llama"))
    request = EditRequest("The picture shows", "Rome", id="tower", image="tower.png")
    with pytest.raises(
        UnsupportedUseError, match=r"text only, .*'image' is set in request 'tower'"
    ):
        method.edit([request])
    data = Pictures(path=FACTS, train_path=FACTS)
    probe = r"'image' is set in locality probe 'The picture shows'"
    with pytest.raises(UnsupportedUseError, match=probe):
        trainer().test(method, data)
    if kind is Learner:
        with pytest.raises(UnsupportedUseError, match=probe):
            trainer(max_epochs=1).fit(method, data)
