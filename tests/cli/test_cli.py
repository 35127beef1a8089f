"""The command line: what it runs, what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from places import ROOT, SAMPLES, TESTS
from support import tiny_model, tiny_tokenizer

import kedit_lightning.data
import kedit_lightning.methods
from kedit_lightning import __version__, registry
from kedit_lightning.cli import help_pages
from kedit_lightning.cli.config_arguments import (
    config_file,
    packaged_configs,
    with_saved_config,
    with_saved_method,
)
from kedit_lightning.cli.help_pages import caching, help_page, saved_help
from kedit_lightning.cli.main import HELP, KEditCLI, main
from kedit_lightning.errors import ResumeError
from kedit_lightning.runs.prompts import prompt_loader

DATA = SAMPLES
FACTS = str(DATA / "facts.json")
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let configs name the methods of the tests, and work in a folder of the test's own."""
    monkeypatch.setenv("KEDIT_ALLOW_IMPORTS", "toys")
    monkeypatch.chdir(tmp_path)
    import toys  # noqa: F401


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two saved base models, ``llama`` and ``gpt2``."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2"):
        tiny_model(kind, torch.float32).save_pretrained(root / kind)
        tiny_tokenizer(kind != "gpt2").save_pretrained(root / kind)
    return root


@pytest.fixture
def toy(folder: Path) -> list[str]:
    """Arguments that name a method and a base model."""
    return [
        "--model=Toy",
        f"--model.base_model={folder / 'llama'}",
        "--trainer.accelerator=cpu",
        "--trainer.protocol.max_new_tokens=4",
    ]


DATASET = ["--data=Requests", f"--data.path={FACTS}", "--data.limit=2"]


def complaint(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says before it ends with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said.splitlines()[-1] == errors[0]
    return errors[0]


# ---- commands


def test_edit_then_predict_in_a_new_process(
    toy: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["edit", *toy, *DATASET, "--data.limit=1", "--output=run"])
    shown = capsys.readouterr().out
    assert "1 edit saved in run" in shown
    assert "Norway" in shown
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["model"]["class_path"] == "toys.Toy"
    assert {p.name for p in tmp_path.iterdir()} <= {"run", "cache"}  # nothing else is written
    code = "import sys; from kedit_lightning.cli.main import main; sys.exit(main())"
    question = [
        "predict",
        "--model=toys.Toy",
        *toy[1:],
        "--edits=run",
        "--prompt=Amber Falls lies in",
    ]
    paths = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, *question],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "Norway" in done.stdout
    assert "1 edit applied" in done.stdout
    assert done.stderr == ""


def test_predict_takes_the_method_of_the_run_that_made_the_edits(
    toy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["edit", *toy, *DATASET, "--data.limit=1", "--output=run"])
    capsys.readouterr()
    main(["predict", "--edits=run", "--prompt=Amber Falls lies in"])
    shown = capsys.readouterr().out
    assert "Norway" in shown
    assert "1 edit applied" in shown
    given = ["predict", *toy, "--edits=run"]
    assert with_saved_method(given) == given
    assert with_saved_method(["test", "--edits=run"]) == ["test", "--edits=run"]


@pytest.mark.parametrize(
    "prompts",
    [
        ["Rome is"],
        ["Amber Falls lies in", "Rome is"],
        ["[1]", "5", "Question: who"],
        ["- a", '{"a": 1}', "null", "# é 🙂", 'say "no"', "[a, b]"],
    ],
)
def test_predict_answers_every_prompt_as_it_was_given(
    prompts: list[str], toy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(prompts: list[str], batch_size: int) -> Any:
        asked.extend(prompts)
        return prompt_loader(prompts, batch_size)

    monkeypatch.setattr("kedit_lightning.trainer.prompt_loader", load)
    first, *others = (f"--prompt={prompt}" for prompt in prompts)
    main(["predict", first, *toy, *others])
    assert asked == prompts
    apart = [part for prompt in prompts for part in ("--prompt", prompt)]
    if not any(prompt.startswith("-") for prompt in prompts):
        asked.clear()
        main(["predict", *apart, *toy])
        assert asked == prompts


def test_a_missing_path_of_edits_and_an_empty_prompt_are_named(
    toy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(["predict", *toy, "--edits=no/run", "--prompt=x", "--prompt=y"], capsys)
    assert "there is nothing at no/run" in said
    assert "--prompt" in complaint(["predict", *toy, "--prompt=x", "--prompt"], capsys)


@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_test_writes_results(mode: str, toy: list[str], tmp_path: Path) -> None:
    protocol = [f"--trainer.protocol.mode={mode}", "--trainer.protocol.evaluate=final,immediate"]
    main(["test", *toy, *DATASET, *protocol, "--output=run"])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["protocol"]["mode"] == mode
    assert results["scores"]["rewrite/tf_tok"]["n"] == 2


def test_one_fact_on_the_command_line(toy: list[str]) -> None:
    fact = ["--data.prompt=Amber Falls lies in", "--data.subject=Amber Falls"]
    cli = main(["edit", *toy, "--data=Requests", *fact, "--data.target_new=Norway"])
    assert cli.trainer.lightning_module.summary[0].n == 1


def test_parts_of_a_base_model_may_stand_beside_its_name(toy: list[str]) -> None:
    cli = main(["test", *toy, *DATASET, "--model.base_model.dtype=bfloat16"])
    assert cli.model.base.dtype == torch.bfloat16


def test_validate_and_a_checkpoint_that_overrules(toy: list[str], tmp_path: Path) -> None:
    learner = ["--model=Learner", *toy[1:]]
    data = [*DATASET, f"--data.train_path={FACTS}", f"--data.val_path={FACTS}"]
    root = f"--trainer.default_root_dir={tmp_path / 'fit'}"
    main(["fit", *learner, "--model.strength=7", *data, root, "--trainer.max_epochs=1"])
    (checkpoint,) = (tmp_path / "fit/checkpoints").glob("*.ckpt")
    assert yaml.safe_load((tmp_path / "fit/config.yaml").read_text())["model"]["init_args"]
    with pytest.warns(UserWarning, match=r"checkpoint overrules .*strength: 9\.0 -> 7\.0"):
        cli = main(["validate", *learner, "--model.strength=9", *data, f"--ckpt_path={checkpoint}"])
    assert cli.model.hparams.strength == 7.0


def test_resume_needs_no_other_option(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = [*toy, "--model.fail_on=Bolt"]
    said = complaint(["test", *method, *DATASET, "--output=run"], capsys)
    assert "request '1'" in said
    assert "continue with --resume run" in said
    before = (tmp_path / "run/config.yaml").read_text()
    said = complaint(["test", "--resume", "run"], capsys)  # the cause is still there
    assert "request '1'" in said
    said = complaint(["test", *toy, *DATASET, "--resume=run"], capsys)
    assert "method.settings.fail_on: 'Bolt' -> None" in said
    assert (tmp_path / "run/config.yaml").read_text() == before
    assert len((tmp_path / "run/results.jsonl").read_text().splitlines()) == 1
    args = ["test", "--resume=run", "--verbose=false"]
    assert with_saved_config(args)[1:3] == ["--config=run/config.yaml", "--output=null"]
    assert with_saved_config([*args, "-c", "x"]) == [*args, "-c", "x"]
    with pytest.raises(ResumeError, match="no run to resume in 'nowhere'"):
        with_saved_config(["test", "--resume", "nowhere"])
    with pytest.raises(ResumeError, match="one of `kedit test`, which goes on with `kedit test"):
        with_saved_config(["edit", "--resume", "run"])


def test_options_of_the_data_need_a_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    fact = ["--data.prompt=Rome is in", "--data.target_new=Peru"]
    said = complaint(["edit", "-c", "methods/ftm", *fact], capsys)
    assert "options of the data need a dataset: put --data Requests before them" in said


# ---- configs


def shipped() -> list[str]:
    return packaged_configs()


def test_names_of_packaged_configs() -> None:
    assert {"trainer/default", "trainer/sequential", "data/counterfact"} <= set(shipped())
    for name in ("trainer/default", "trainer/default.yaml", "configs/trainer/default.yaml"):
        assert Path(config_file(name)) == CONFIGS / "trainer" / "default.yaml"


def test_a_file_goes_before_a_packaged_config(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer/default.yaml").write_text("trainer: {max_epochs: 3}")
    assert config_file("trainer/default.yaml") == "trainer/default.yaml"


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = name.split("/")[0]
    text = (CONFIGS / f"{name}.yaml").read_text()
    first = text.splitlines()[0]
    assert first.startswith("# kedit "), "opens with the command that uses it"
    assert name in first
    command = "fit" if name == "data/texts" else "test"
    named = kind in ("methods", "variants") or name.startswith("benchmark/settings")
    others = [] if named else ["--model=Toy"]
    with pytest.raises(SystemExit) as stop:
        main([command, "-c", name, *others, "--print_config"])
    assert not stop.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(text)
    given.pop("methods", None)  # of a task: settings of methods that are not named here

    def within(part: Any, whole: Any) -> bool:
        if isinstance(part, dict):
            return all(within(value, whole.get(key)) for key, value in part.items())
        if isinstance(part, list) and any(isinstance(value, dict) for value in part):
            return all(within(*pair) for pair in zip(part, whole, strict=True))
        return bool(part == whole or str(whole).endswith(f".{part}") or str(whole) == str(part))

    assert within(given, parsed)


def test_configs_compose_and_options_override(toy: list[str], tmp_path: Path) -> None:
    (tmp_path / "method.yaml").write_text("model: {class_path: Toy, init_args: {strength: 5}}")
    (tmp_path / "base.yaml").write_text(f"model: {{init_args: {{base_model: {toy[1][19:]}}}}}")
    data = f"data: {{class_path: Requests, init_args: {{path: {FACTS}, limit: 1}}}}"
    (tmp_path / "data.yaml").write_text(data)
    cli = main(
        [
            "test",
            "-c",
            "method.yaml",
            "-c",
            "base.yaml",
            "--config=data.yaml",
            "-c",
            "trainer/sequential",
            "--trainer.protocol.chunk_size=1",
            "--data.limit=2",
            "--trainer.accelerator=cpu",
            "--trainer.protocol.max_new_tokens=2",
        ]
    )
    assert cli.trainer.protocol.mode == "sequential"
    assert (cli.trainer.protocol.chunk_size, cli.datamodule.limit) == (1, 2)
    assert cli.model.hparams.strength == 5.0
    assert cli.trainer.lightning_module.summary


def test_objects_only(toy: list[str]) -> None:
    cli = main([*toy, *DATASET], run=False)
    assert isinstance(cli, KEditCLI)
    assert type(cli.model).__name__ == "Toy"
    assert cli.trainer.protocol.max_new_tokens == 4


# ---- plug-ins


class Plugin:
    """What stands in for an entry point of an outside package."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, module

    def load(self) -> Any:
        return __import__(self.module)


def test_plugins_are_imported_and_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [Plugin("good", "toys.inner"), Plugin("broken", "no_such_module")]
    monkeypatch.setattr(Plugin, "load", lambda self: __import__(self.module.partition(".")[0]))
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match="plug-in 'broken' cannot be loaded"):
        assert registry.load_plugins() == ["toys"]


PLUGIN = """
from kedit_lightning.callbacks import EditTable
from kedit_lightning.data import Requests
from kedit_lightning.registry import Entry, register
from toys import Toy


class OutsideMethod(Toy): ...
class OutsideData(Requests): ...
class OutsideCallback(EditTable): ...


for kind, name in (
    ("method", "OutsideMethod"), ("dataset", "OutsideData"), ("callback", "OutsideCallback"),
):
    register(Entry(kind, name, "outside_plugin", "of another package"))
"""


def test_a_plugin_adds_a_method_a_dataset_and_a_callback(
    toy: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "outside_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Plugin("outside", "outside_plugin")]
    )
    kinds = {kind: dict(entries) for kind, entries in registry._ENTRIES.items()}
    monkeypatch.setattr(registry, "_ENTRIES", kinds)
    data = ["--data=OutsideData", f"--data.path={FACTS}", "--data.limit=1"]
    callback = "--trainer.callbacks+=OutsideCallback"
    cli = main(["test", "--model=OutsideMethod", *toy[1:], *data, callback])
    module = sys.modules["outside_plugin"]
    assert type(cli.model) is module.OutsideMethod
    assert type(cli.datamodule) is module.OutsideData
    assert any(type(added) is module.OutsideCallback for added in cli.trainer.callbacks)
    assert kedit_lightning.methods.OutsideMethod is module.OutsideMethod  # exported as ours are
    assert kedit_lightning.data.OutsideData is module.OutsideData


# ---- what is refused


def test_a_config_cannot_run_code_of_its_choice(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil.yaml").write_text("model: {class_path: os.system, init_args: {command: ls}}")
    said = complaint(["test", "-c", "evil.yaml", *DATASET], capsys)
    assert "os.system" in said
    assert "KEDIT_ALLOW_IMPORTS" in said
    callback = "{class_path: subprocess.Popen, init_args: {args: ls}}"
    said = complaint(["test", *toy, *DATASET, f"--trainer.callbacks=[{callback}]"], capsys)
    assert "subprocess.Popen" in said


def test_unknown_names_are_named(toy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("model: {class_path: Toy\ndata: [\n")
    for args, words in (
        (["test", "--model=Rome", *DATASET], ("'Rome' for --model", "ROME")),
        (["test", *toy, "--data=CounterFacts"], ("'CounterFacts' for --data", "CounterFact ")),
        (
            ["test", *toy, *DATASET, "--model.strenght=3"],
            ("--model.strenght (was strength meant?)",),
        ),
        (["compar", "run"], ("no command 'compar'", "was compare meant")),
        (["test", "--model.help", "ROMEE"], ("no 'ROMEE' for --model", "was ROME or")),
        (["test", *toy, *DATASET, "--outptu=x"], ("--outptu", "was --output meant")),
        (["test", *toy, *DATASET, "--outp=x"], ("--outp", "was --output meant")),
        (["test", *toy, *DATASET, "--trainer.protocol.mode=all"], ("protocol.mode", "'single'")),
        (["test", *toy, *DATASET, "--trainer.protocol.chunk_size=0"], ("chunk_size", "at least 1")),
        (["test", "-c", "methods/roem", *DATASET], ("methods/roem", "methods/rome")),
        (["test", *DATASET], ("no editing method was named", "--model ROME")),
        (["edit", *toy[1:], *DATASET], ("no editing method was named",)),
        (["test", *toy], ("test was given no data",)),
        (
            ["test", *toy, "--model.base_model.dtype=int9"],
            ("--model.base_model.dtype", "'float32'"),
        ),
        (["predict", *toy], ("predict was given no prompt",)),
        (["tset", *toy], ("no command 'tset'", "was test meant")),
        (
            ["test", *toy, *DATASET, "--data.limit=few"],
            ("--data.limit must be int or null, got 'few'",),
        ),
        (["test", *toy, *DATASET, "--trainer.callbacks=EditTabel"], ("EditTabel", "was EditTable")),
        (["test", "-c", "bad.yaml"], ("'bad.yaml' is no YAML", "line 2")),
        (["test", *toy, *DATASET, "--ckpt_path=x.ckpt"], ("no checkpoint at x.ckpt",)),
        (["test", *toy, *DATASET, f"--ckpt_path={FACTS}"], ("facts.json is no checkpoint",)),
        (["test", *toy, "--data=Texts", "--data.path=x"], ("Texts holds nothing for test",)),
        (["test", *toy, *DATASET, "--resume=nowhere"], ("nowhere holds no run",)),
        (["fit", *toy, *DATASET], ("Toy learns nothing",)),
    ):
        said = complaint(args, capsys)
        assert all(word in said for word in words), said


def test_unknown_base_model(toy: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = complaint(["test", *toy, "--model.base_model=no/such-model", *DATASET], capsys)
    assert "no/such-model" in said
    assert "nano" in said


def test_a_base_model_is_not_looked_for_when_the_data_is_wrong(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "Amber Falls lies in", "target_new": "Norway", "subject": "Amber Falls"}
    bad = [{"subject": "Elsewhere"}, {"target_new": " "}, {"prompt": None}]
    lines = [json.dumps({**good, **change}) for change in [{}, *bad]]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    data = ["--data=Requests", "--data.path=facts.jsonl"]
    said = complaint(["edit", *toy, "--model.base_model=no/such-model", *data], capsys)
    assert "3 bad records" in said
    for words in ("line 2", "'subject'", "line 3", "'target_new'", "line 4", "'prompt'"):
        assert words in said


def test_subject_that_is_not_in_its_prompt(
    toy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fact = ["--data.prompt=Amber Falls lies in", "--data.subject=Tarn", "--data.target_new=Norway"]
    said = complaint(["edit", *toy, "--data=Requests", *fact], capsys)
    assert "'subject' ('Tarn') does not occur in the prompt" in said


def test_nan_in_the_weights(
    folder: Path, toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer(True).save_pretrained(tmp_path / "nan")
    said = complaint(["edit", *toy, "--model.base_model=nan", *DATASET], capsys)
    assert "model.layers.1.mlp.up_proj.weight" in said


def test_edits_of_another_base_model(
    folder: Path, toy: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["edit", *toy, *DATASET, "--output=run"])
    other = [*toy, f"--model.base_model={folder / 'gpt2'}"]
    said = complaint(["predict", *other, "--edits=run", "--prompt=x"], capsys)
    assert "llama" in said
    assert "gpt2" in said
    assert "--force of `kedit predict`" in said
    said = complaint(["predict", *other, "--edits=run", "--prompt=x", "--force"], capsys)
    assert "does not fit" in said


def test_edits_of_another_checkpoint_are_applied_by_force(
    folder: Path, toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["edit", *toy, *DATASET, "--output=run"])
    model = tiny_model("llama", torch.float32)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    model.save_pretrained(tmp_path / "later")
    tiny_tokenizer(True).save_pretrained(tmp_path / "later")
    asked = ["predict", *toy, "--model.base_model=later", "--prompt=Amber Falls lies in"]
    assert "fingerprint" in complaint([*asked, "--edits=run"], capsys)
    for edits in ("run", str(next(Path("run").rglob("*.safetensors")))):
        main([*asked, f"--edits={edits}", "--force"])
        assert "applied" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from toys import Toy

    monkeypatch.setattr(Toy, "compute_edit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["test", *toy, *DATASET])


def test_the_error_of_a_constructor_is_found_in_the_chain(
    toy: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from toys import Toy

    from kedit_lightning.errors import UnsupportedUseError

    def refuse(self: Any, **_: Any) -> None:
        raise UnsupportedUseError("this toy is broken; take another")

    monkeypatch.setattr(Toy, "__init__", refuse)
    assert "this toy is broken" in complaint(["test", "--model=Toy", *DATASET], capsys)


# ---- help


def test_help_names_every_command() -> None:
    listed = HELP.split("commands:")[1].split("also:")[0]
    assert set(KEditCLI.subcommands()) == {line.split()[0] for line in listed.strip().splitlines()}


@pytest.mark.parametrize("command", sorted(KEditCLI.subcommands()))
def test_help_of_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    text = capsys.readouterr().out
    (described,) = (
        line.split(maxsplit=1)[1] for line in HELP.splitlines() if line.startswith(f"  {command} ")
    )
    assert described.split()[0].lower() in " ".join(text.split()).lower()
    for option in {"test": ("--output", "--resume"), "edit": ("--export",)}.get(command, ()):
        assert option in text
    assert ":meth:" not in text


def test_help_shows_our_settings_and_full_help_those_of_lightning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    for option in ("--help", "--help-all", "-h"):  # one shows nothing to the next
        with pytest.raises(SystemExit) as stop:
            main(["test", option])
        assert not stop.value.code
        texts.append(capsys.readouterr().out)
    short, full, again = texts
    assert short == again
    assert short.startswith("usage: kedit test [options]\n")
    order = ["--model ", "--data ", "--output ", "--resume ", "--trainer.protocol.mode "]
    places = [short.index(option) for option in [*order, "--trainer.devices "]]
    assert places == sorted(places)
    hidden = "--trainer.gradient_clip_val"
    assert (hidden in short, hidden in full) == (False, True)
    assert all(line.strip() in full for line in short.splitlines())
    assert len(short.splitlines()) < 0.5 * len(full.splitlines())
    assert "ROME" in short
    assert "kedit_lightning.methods" not in "".join(full.split())
    with pytest.raises(SystemExit):
        main(["test", "--model.help", "ROME"])
    assert "default: nano, known: BaseModel" in " ".join(capsys.readouterr().out.split())


#: Prints the help of every command, with a line between, in a process that loads no test class.
EACH_HELP = """
import sys
from kedit_lightning.cli import main
for command in {commands}:
    sys.argv = ["kedit", command, "--help"]
    try: main.main()
    except SystemExit as stop: assert not stop.code
    print(">>>")
"""


def test_cached_help_is_what_the_parser_shows(tmp_path: Path) -> None:
    """A first process renders help, says so and saves it; the second has no Lightning."""
    code = EACH_HELP.format(commands=sorted(KEditCLI.subcommands()))
    uncached = "main.help_page = lambda arguments: None" + code.partition("import main")[2]
    block = "import sys; sys.modules.update(lightning=None, torch=None, jsonargparse=None)"
    environment = {**os.environ, "COLUMNS": "101"}

    def output(code: str) -> tuple[str, str]:
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        return result.stdout, result.stderr

    (text, notes), (cached, silence) = output(code + uncached), output(block + code)
    assert (notes.count(f"it is kept in {tmp_path / 'cache' / 'help'}"), silence) == (5, "")
    rendered = text.split(">>>\n")[:-1]
    saved, parsed = rendered[:5], rendered[5:]
    assert len(list((tmp_path / "cache" / "help").iterdir())) == len(saved) == len(parsed)
    assert cached.split(">>>\n")[:-1] == saved == parsed
    assert all(text.startswith("usage: kedit") for text in cached.split(">>>\n")[:-1])
    assert max(len(line) for line in saved[0].splitlines()) > 80


def test_what_help_depends_on_makes_a_new_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    page = help_page(["test", "--help"])
    assert page is not None
    assert page == help_page(["test", "-h"])
    assert page != help_page(["fit", "--help"])
    assert page != help_page(["test", "--help-all"])
    for other in (["test"], ["test", "--help", "x"], ["--help"], ["../x", "--help"]):
        assert help_page(other) is None
    monkeypatch.setenv("COLUMNS", "90")
    assert help_page(["test", "--help"]) != page
    monkeypatch.setenv("COLUMNS", "80")
    assert help_page(["test", "--help"]) == page
    monkeypatch.setenv("KEDIT_ALLOW_IMPORTS", "")
    assert help_page(["test", "--help"]) != page
    monkeypatch.setenv("KEDIT_ALLOW_IMPORTS", "toys")
    (tmp_path / "lightning-9.9.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert help_page(["test", "--help"]) != page
    monkeypatch.setattr(help_pages, "entry_points", lambda group: ["a plug-in"])
    assert help_page(["test", "--help"]) is None


def test_a_changed_source_file_makes_a_new_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    (package / "cli").mkdir(parents=True)
    source = package / "trainer.py"
    source.write_text("one = 1")
    monkeypatch.setattr(help_pages, "__file__", str(package / "cli" / "help_pages.py"))
    page = help_page(["test", "--help"])
    source.write_text("one = 11")
    assert help_page(["test", "--help"]) != page


def test_only_help_that_was_printed_whole_is_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(page: Path, code: Any) -> None:
        with caching(page):
            sys.stdout.write("usage")
            raise SystemExit(code)

    page = tmp_path / "help" / "test-80-0.txt"
    with pytest.raises(SystemExit):
        leave(page, 2)
    assert not page.exists()
    page.parent.mkdir()
    stale, other = page.with_name("test-80-1.txt"), page.with_name("test-90-1.txt")
    stale.touch()
    other.touch()
    with pytest.raises(SystemExit):
        leave(page, 0)
    assert (page.read_text(), capsys.readouterr().out) == ("usage", "usageusage")
    assert sorted(page.parent.iterdir()) == [page, other]
    with pytest.raises(SystemExit):
        leave(page / "no folder" / "x.txt", 0)
    assert [saved_help(path) for path in (page, page.parent, page / "x.txt")] == ["usage", "", ""]


def test_help_and_version_need_neither_lightning_nor_torch() -> None:
    code = (
        "import sys\nfrom kedit_lightning.cli.main import main\n"
        "for args in (['--help'], ['--version']):\n"
        "    try: main(args)\n    except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"kedit {__version__}" in done.stdout
    assert "kedit predict" in done.stdout


def test_module_form() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kedit_lightning"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == HELP


TEXTS = ["Question: who wrote Hamlet", "- Amber Falls", "# 7 lies in", "{a} b", "Who: whom: he"]


@pytest.mark.parametrize("prompt", TEXTS)
def test_a_prompt_that_yaml_would_read_otherwise_stays_text(
    toy: list[str], capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    fact = [f"--data.prompt={prompt}", "--data.target_new=Bacon"]
    cli = main(["edit", *toy, "--data=Requests", *fact])
    assert cli.datamodule.examples("test")[0].requests[0].prompt == prompt
