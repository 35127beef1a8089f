"""How arguments name a base model, and what configs may not ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kedit_lightning.cli.base_model_arguments import with_one_base_model
from kedit_lightning.cli.main import main

SHORT = ["--data=NanoFacts", "--data.limit=1", "--trainer.accelerator=cpu"]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def config(name: str, base_model: object) -> str:
    model = {"class_path": "FTM", "init_args": {"base_model": base_model}}
    Path(name).write_text(json.dumps({"model": model}))
    return name


@pytest.mark.parametrize(
    ("in_config", "args", "expected"),
    [
        ("nano", ["--model.base_model.dtype=bfloat16"], {"name": "nano", "dtype": "bfloat16"}),
        ({"dtype": "float16"}, [], {"name": "nano", "dtype": "float16"}),
        ({"dtype": "float16"}, ["--model.base_model", "here"], {"name": "here"}),
        ("gone", ["--model.base_model.revision", "7", "--model.base_model=b"], {"revision": "7"}),
        (
            {"name": "a", "device_map": "auto"},
            ["--model.base_model={name: b, dtype: auto}"],
            {"name": "b", "device_map": "auto", "dtype": "auto"},
        ),
        ("nano", ["--model.init_args.base_model.device_map=cpu"], {"device_map": "cpu"}),
    ],
)
def test_settings_of_loading_stand_beside_or_in_place_of_a_name(in_config, args, expected):
    given = ["-c", config("a.yaml", in_config), *SHORT, *args]
    specification = main(given, run=False).model._base_model
    for field, value in expected.items():
        assert getattr(specification, field) == value


def test_a_name_alone_is_left_as_it_is():
    args = ["test", "-c", config("a.yaml", "gpt2"), "--model.base_model", "nano"]
    assert with_one_base_model(args) == args


EVIL = {"name": "nano", "trust_remote_code": True}


@pytest.mark.parametrize("command", [["test", "--resume"], ["predict", "--prompt=x", "--edits"]])
@pytest.mark.parametrize("form", ["mapping", "class"])
def test_a_run_cannot_switch_the_code_of_a_model_on(command, form, capsys, monkeypatch):
    spec = {"class_path": "kedit_lightning.BaseModelSpec", "init_args": EVIL}
    Path("run").mkdir()
    config("run/config.yaml", EVIL if form == "mapping" else spec)
    with pytest.raises(SystemExit) as stop:
        main([*command, "run", "--trainer.accelerator=cpu"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "sets model.base_model.trust_remote_code" in said
    assert "add --model.base_model.trust_remote_code true" in said


def test_no_config_can_but_command_line_and_environment_can(capsys, monkeypatch):
    given = ["-c", config("a.yaml", EVIL), *SHORT]
    with pytest.raises(SystemExit):
        main(given, run=False)
    for said in (
        ["--model.base_model.trust_remote_code=true"],
        [f"--model.base_model={json.dumps(EVIL)}"],
    ):
        assert main([*given, *said], run=False).model._base_model.trust_remote_code
    refused = main([*given, "--model.base_model.trust_remote_code=false"], run=False)
    assert not refused.model._base_model.trust_remote_code
    monkeypatch.setenv("KEDIT_TRUST_REMOTE_CODE", "1")
    assert main(given, run=False).model._base_model.trust_remote_code


def laughs(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x]"]
    for level in range(levels):
        aliases = ", ".join([f"*a{level}"] * 9)
        lines.append(f"a{level + 1}: &a{level + 1} [{aliases}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: &m\n  class_path: ROME\n  init_args: *m\n", "refers to itself"),
        ("trainer: {callbacks: &c [*c]}\n", "refers to itself"),
        ("data: &d\n  class_path: NanoFacts\n  init_args: {path: [[*d]]}\n", "refers to itself"),
        (laughs(), "more than 100000 parts"),
    ],
)
@pytest.mark.parametrize("inline", [False, True])
def test_a_config_without_an_end_is_answered_at_once(text, said, inline, capsys):
    Path("a.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["test", f"--config={text if inline else 'a.yaml'}", *SHORT])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_an_alias_may_be_used_twice():
    text = (
        "model: {class_path: FTM, init_args: {layers: &l [1], steps: 3}}\ntrainer: {devices: *l}\n"
    )
    Path("a.yaml").write_text(text)
    assert (
        main(["-c", "a.yaml", *SHORT, "--trainer.devices=1"], run=False).model.settings.steps == 3
    )
