"""Tasks on the command line: what they set, for which method, and in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import SAMPLES
from tiny_vision import vision_folder

from kedit_lightning.cli.config_arguments import config_file
from kedit_lightning.cli.main import main
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.cli.task_arguments import task_list, with_task_settings
from kedit_lightning.errors import DataFileNotFoundError
from kedit_lightning.registry import entries
from kedit_lightning.task_registry import Task, register_task, tasks, unregister_task

TASK = """
data: {class_path: Requests, init_args: {path: facts.json}}
trainer: {protocol: {max_new_tokens: 7}}
methods:
  FTM: {steps: 3, lr: 0.25}
  ROME: {layer: 1}
"""


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "own_task.yaml"
    path.write_text(TASK)
    return str(path)


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The config that a run with these arguments would save."""
    with pytest.raises(SystemExit) as stop:
        main(["test", *arguments, "--model.base_model=nano", "--print_config"])
    assert not stop.value.code
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


def test_a_task_sets_the_named_method_alone_in_either_order(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = printed(["-c", "methods/ftm"], capsys)["model"]["init_args"]
    assert (plain["steps"], plain["lr"]) != (3, 0.25)
    first = printed(["-c", task, "-c", "methods/ftm"], capsys)
    second = printed(["-c", "methods/ftm", f"--config={task}"], capsys)
    assert first == second
    changed = first["model"]["init_args"]
    assert changed == plain | {"steps": 3, "lr": 0.25}
    assert "methods" not in first
    assert first["data"]["class_path"] == "kedit_lightning.data.Requests"
    assert first["trainer"]["protocol"]["max_new_tokens"] == 7


def test_options_and_later_configs_go_before_what_a_task_sets(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = printed(["-c", task, "--model=FTM", "--model.steps=9"], capsys)
    assert given["model"]["init_args"]["steps"] == 9
    assert given["model"]["init_args"]["lr"] == 0.25
    later = tmp_path / "later.yaml"
    later.write_text("methods: {FTM: {steps: 4}}")
    given = printed(["-c", "methods/ftm", "-c", task, "-c", str(later)], capsys)
    assert (given["model"]["init_args"]["steps"], given["model"]["init_args"]["lr"]) == (4, 0.25)


def test_arguments_stay_where_no_task_sets_anything() -> None:
    args = ["test", "-c", config_file("methods/grace"), "--model.base_model", "nano"]
    assert with_task_settings(args) == args
    assert with_task_settings(["test", "--model"]) == ["test", "--model"]


def test_settings_of_what_is_no_method_are_refused(tmp_path: Path) -> None:
    cases = (("{ROMMEL: {}}", "which is no method .was ROME"), ("[ROME]", "such as MEND"))
    for text, said in cases:
        with pytest.raises(UsageError, match=said):
            with_task_settings(["test", "-c", json.dumps({"methods": yaml.safe_load(text)})])


def test_unknown_tasks_name_the_known() -> None:
    with pytest.raises(DataFileNotFoundError, match=r"tasks/zzz.*known are tasks/.*tasks/") as told:
        config_file("tasks/zzz")
    assert "methods/" not in str(told.value)


def test_a_plug_in_adds_a_task(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = register_task(Task("own", "is it written", "Requests", ("ExactMatch",), Path(task)))
    try:
        assert config_file("tasks/own") == task
        assert tasks()["own"] is own
        assert "FTM (steps, lr), ROME (layer)" in task_list()
    finally:
        unregister_task(own)


def test_the_list_names_all_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tasks"])
    assert not stop.value.code
    said = capsys.readouterr().out
    for name, known in tasks().items():
        assert f"\n  {name}\n" in said
        for metric in known.metrics:
            assert entries("metric")[metric].load().name in said


#: Samples of the tasks, and settings that keep their runs short.
SAMPLES_OF = {
    "safety": "safeedit.json",
    "concept": "final_gpt2_inter.json",
    "multimodal": "vqa_eval.json",
    "personality": "personalityedit.json",
    "truthfulness": "truthfulqa.csv",
    "unstructured": "unke.json",
}


def test_every_task_has_a_sample() -> None:
    assert set(SAMPLES_OF) == set(tasks())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in SAMPLES_OF for method in ("ftm", "grace", "prompt")),
        *(("personality", method) for method in ("ike", "mend")),
    ],
)
def test_a_task_runs_with_any_method(name: str, method: str, tmp_path: Path) -> None:
    arguments = ["test", "-c", f"tasks/{name}", "-c", f"methods/{method}"]
    model = vision_folder(tmp_path / "llava") if name == "multimodal" else "nano"
    arguments += [f"--model.base_model={model}", "--trainer.accelerator=cpu", "--data.limit=1"]
    arguments += [f"--data.path={SAMPLES / 'published' / SAMPLES_OF[name]}"]
    if method == "ike":  # demonstrations
        arguments += [f"--data.train_path={SAMPLES / 'published' / SAMPLES_OF[name]}"]
    main([*arguments, f"--output={tmp_path / 'run'}", "--trainer.protocol.max_new_tokens=8"])
    scores = json.loads((tmp_path / "run" / "results.json").read_text())["scores"]
    own = {entries("metric")[metric].load().name for metric in tasks()[name].metrics}
    assert own & {key.rpartition("/")[2] for key in scores}
    changed = {key.lower(): set_ for key, set_ in tasks()[name].method_settings().items()}
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]
    assert {key: settings[key] for key in changed.get(method, ())} == changed.get(method, {})
