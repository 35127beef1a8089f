"""The benchmark: cells and their commands, runs that go on after a kill, and the page."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark import main
from benchmark_cells import CONFIGS, FITTED, LEFT_OUT, SIZES, TRIALS, Cell, Sweep, methods, plan
from benchmark_page import page, write_page
from benchmark_runs import MARK, Progress, finished, forked, run, take_settings
from benchmark_scores import collected
from benchmark_summary import summary
from metric_records import example, probe
from places import ROOT

from kedit_lightning.benchmark import Protocol
from kedit_lightning.cli.sweep_plan import read_plan
from kedit_lightning.cli.sweep_trial import built_test
from kedit_lightning.registry import entries
from kedit_lightning.runs.record_lines import line_of

# Python 3.12 warns where a process with threads is copied; the copy here runs one command and ends.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
SWEEPS = sorted((CONFIGS / "benchmark" / "sweeps").glob("*.yaml"))
SETTINGS = sorted((CONFIGS / "benchmark" / "settings").rglob("*.yaml"))


# ---- cells


def test_the_cells_are_every_method_data_set_and_protocol(tmp_path: Path) -> None:
    (tmp_path / "zsre").mkdir()
    (tmp_path / "zsre" / "zsre_mend_edit.json").touch()
    found = plan(folder=str(tmp_path), models=["nano", "facts-30m"])
    names = [cell.name for cell in found.cells]
    assert len(names) == len(set(names))
    ready = len(methods()) - len(FITTED)
    assert len(names) == (2 + 3) * len(SIZES) * ready
    assert "facts-30m.zsre.sequence.memit" in names
    assert "facts-30m.facts_30m.single.ftm" in names
    chosen = {sweep.model: sweep.command for sweep in found.sweeps}
    assert "-c data/facts_30m" in chosen["facts-30m"]
    assert "facts_30m" not in chosen["nano"]
    for absent in ("counterfact", "wiki_counterfact"):
        assert any(one.startswith(f"{absent}: no file") for one in found.skipped)
    assert set(LEFT_OUT) < set(entries("method"))
    assert {path.stem for path in SWEEPS} <= set(methods().values())


def test_a_method_that_learns_joins_once_it_is_fitted(tmp_path: Path) -> None:
    best = tmp_path / "nano" / "ke" / "checkpoints" / "best.ckpt"
    best.parent.mkdir(parents=True)
    best.touch()
    (cell,) = plan(part="nano.nano_facts.single.ke", fits=tmp_path, models=["nano"]).cells
    assert shlex.join(["--ckpt_path", str(best)]) in cell.command
    assert "KE on nano: needs a fit" not in " ".join(plan(fits=tmp_path, models=["nano"]).skipped)


def test_parts_are_named_by_beginnings_and_patterns() -> None:
    def names(part: str) -> list[str]:
        return [cell.name for cell in plan(True, part, models=["nano"]).cells]

    assert names("nano.nano_facts.single.memit") == ["nano.nano_facts.single.memit"]
    assert all(name.startswith("nano.nano_facts.batch.") for name in names("nano.nano_facts.batch"))
    assert names("nano.nano_facts.batch")
    assert names("nano.nano") == []
    assert {name.split(".")[-1] for name in names("*.memit")} == {"memit"}
    assert set(names("*")) == {cell.name for cell in plan(True, models=["nano"]).cells}
    assert [one.method for one in plan(True, "*.memit", models=["nano"]).sweeps] == ["memit"]


def test_what_names_no_finished_cell_leaves_the_page_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page_of = tmp_path / "page"
    given = ["--subset", "--output", str(tmp_path / "runs"), "--page-folder", str(page_of)]
    assert main([*given, "--part", "nonsense"]) == 2
    assert "no cell has the name 'nonsense'" in capsys.readouterr().err
    assert main([*given, "--page"]) == 0
    assert "no cell is finished" in capsys.readouterr().out
    assert not page_of.exists()
    with pytest.raises(SystemExit, match="0 cells are finished, and 3 were to be drawn"):
        main([*given, "--reproduce", "3"])


#: Cells with all protocols and data sets, and settings that were chosen.
FEW = [
    ("single", "nano_facts", "memit"),
    ("batch", "zsre", "ftm"),
    ("sequence", "counterfact", "ike"),
]


def parsed(cell: Cell) -> None:
    config = built_test(cell.arguments("somewhere")[1:]).config["test"]
    assert (
        config.model.class_path.rpartition(".")[2]
        == {v: k for k, v in methods().items()}[cell.method]
    )
    mode = {"sequence": "sequential"}.get(cell.protocol, cell.protocol)
    assert config.trainer.protocol.mode == mode
    assert config.trainer.protocol.orders == (3 if mode == "sequential" else 1)
    assert config.data.init_args.limit == cell.facts
    assert config.seed_everything == 0
    assert [one.class_path.rpartition(".")[2] for one in config.trainer.callbacks] == [
        "AbilitySample"
    ]
    for path in (CONFIGS / f"{cell.settings}.yaml",) if cell.settings else ():
        for name, value in yaml.safe_load(path.read_text())["model"]["init_args"].items():
            assert config.model.init_args[name] == value


@pytest.mark.parametrize(("protocol", "data", "method"), FEW)
def test_the_command_of_a_cell_parses(protocol: str, data: str, method: str) -> None:
    own = f"benchmark/settings/nano/{method}"
    own = own if (CONFIGS / f"{own}.yaml").is_file() else ""
    cell = Cell("nano", data, protocol, method, 7, "../shared/data", own)
    assert shlex.split(cell.command)[1:] == cell.arguments(f"runs/{cell.name}")
    parsed(cell)


@pytest.mark.slow
def test_the_commands_of_all_methods_parse() -> None:
    for cell in plan(True, "nano.nano_facts.single", models=["nano"]).cells:
        parsed(cell)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_choice_has_the_same_budget(path: Path) -> None:
    sweep = read_plan([str(path), *Sweep("nano", path.stem, 9).arguments("out")[2:]], "")
    kept = {"objective": "score", "split": "validation", "every": 10}
    assert {name: getattr(sweep, name) for name in kept} == kept
    budget = sweep.budget
    assert (budget.trials, budget.seed, budget.sampler, budget.pruner) == (TRIALS, 0, "tpe", "none")
    choice = "choice_batch" if path.stem == "ultraedit" else "choice"
    assert sweep.config == (f"methods/{path.stem}", "data/nano_facts", f"benchmark/{choice}")


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_that_were_chosen_lie_in_the_space_and_say_how(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"Chosen among {TRIALS} trials by kedit sweep configs/benchmark/sweeps/" in text
    assert "of 20 trials" in text
    assert "validation split" in text
    space = yaml.safe_load((CONFIGS / "benchmark/sweeps" / path.name).read_text())["space"]
    given = yaml.safe_load(text)["model"]["init_args"]
    assert set(given) == {name.removeprefix("model.") for name in space}
    for name, value in given.items():
        part = space[f"model.{name}"]
        inside = part if isinstance(part, list) else None
        assert value in inside if inside else float(part["low"]) <= value <= float(part["high"])


# ---- runs


@dataclass(frozen=True)
class Say:
    """A step that prints something."""

    words: tuple[str, ...]
    name: str = "a.b.c.d"

    @property
    def command(self) -> str:
        return shlex.join(["kedit", *self.words])

    def arguments(self, output: str) -> list[str]:
        return list(self.words)


def test_a_step_is_finished_by_its_own_command_alone(tmp_path: Path) -> None:
    said = run(Say(("metrics",)), tmp_path)
    assert "error" not in said
    assert "rewrite" in (tmp_path / "a.b.c.d.log").read_text()
    assert said["processor_seconds"] >= 0
    assert said["peak_bytes"] > 1 << 20
    assert finished(Say(("metrics",)), tmp_path) == said
    assert finished(Say(("tasks",)), tmp_path) is None
    refused = run(Say(("metrics", "more")), tmp_path)
    assert refused["error"] == "kedit metrics takes no arguments, got ['more']"
    lines = Progress([Say(("metrics",))]).tell(refused | {"wall_seconds": 3})
    assert lines.startswith("[1/1] a.b.c.d failed: kedit metrics takes no arguments")


def test_a_process_that_was_killed_leaves_its_step_open(tmp_path: Path) -> None:
    def killed(arguments: Any, log: Path) -> Any:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _, status, _ = os.wait4(child, 0)
        return forked(arguments, log).__class__(os.waitstatus_to_exitcode(status), 0.0, 0)

    with pytest.raises(SystemExit, match="was killed \\(signal 9\\); the same command goes on"):
        run(Say(("metrics",)), tmp_path, killed)
    assert finished(Say(("metrics",)), tmp_path) is None


CELL = Cell("nano", "nano_facts", "sequence", "ultraedit", 12, "none")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cell_goes_on_after_a_kill_and_ends_like_an_unbroken_one(tmp_path: Path) -> None:
    whole = run(CELL, tmp_path / "whole")
    assert "error" not in whole
    broken = tmp_path / "broken"
    results = broken / CELL.name / "results.jsonl"
    child = os.fork()
    if child == 0:
        # Its own child is killed with it: both stand in a group of their own.
        os.setpgid(0, 0)
        try:
            run(CELL, broken)
        finally:
            os._exit(1)
    end = time.monotonic() + 200
    while not (results.is_file() and results.read_bytes().count(b"\n") > 12):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert finished(CELL, broken) is None
    assert "error" not in run(CELL, broken)
    for name in ("ability_sample.json", "orders.json"):
        one, other = (tmp_path / side / CELL.name / name for side in ("whole", "broken"))
        assert json.loads(one.read_text()) == json.loads(other.read_text())
    assert not (broken / CELL.name / "edits").exists()
    names = [f"{CELL.name}/{own}results.json" for own in ("", "orders/1/", "orders/2/")]
    for name in names:
        one, other = (json.loads((tmp_path / s / name).read_text()) for s in ("whole", "broken"))
        assert one["scores"] == other["scores"]


def test_the_best_settings_become_a_config(tmp_path: Path) -> None:
    sweep = Sweep("nano", "grace", 10)
    assert take_settings(sweep, tmp_path, tmp_path) is None
    own = tmp_path / sweep.name
    own.mkdir()
    found = {"layer": 4, "radius": 2.5, "steps": 40, "module": None}
    config = {"model": {"class_path": "x.GRACE", "init_args": found}}
    head = "# Best of 20 trials of study grace on the validation split: score 0.5\n# radius: 2.5\n"
    (own / "best.yaml").write_text(head + yaml.safe_dump(config))
    path = take_settings(sweep, tmp_path, tmp_path / "chosen")
    assert path == tmp_path / "chosen" / "nano" / "grace.yaml"
    text = path.read_text()
    assert "# Best of 20 trials on the validation split: score 0.5, on 10 facts." in text
    assert yaml.safe_load(text)["model"] == {
        "class_path": "x.GRACE",
        "init_args": {"radius": 2.5, "steps": 40, "layer": 4},
    }
    assert "-c data/nano_facts -c benchmark/single -c benchmark/settings/nano/grace --data" in text


def test_settings_of_another_base_model_name_it_and_its_data(tmp_path: Path) -> None:
    sweep = Sweep("facts-30m", "grace", 10)
    (own := tmp_path / sweep.name).mkdir()
    found = {"radius": 2.5, "steps": 40, "layer": 4}
    config = {"model": {"class_path": "x.GRACE", "init_args": found}}
    (own / "best.yaml").write_text("# Best of 20 trials of study grace\n" + yaml.safe_dump(config))
    path = take_settings(sweep, tmp_path, tmp_path / "chosen")
    assert path is not None
    command = path.read_text().splitlines()[0]
    assert "-c data/facts_30m " in command
    assert " --model.base_model facts-30m " in command


# ---- the page

HELD = {"ftm": 20 * [True], "memit": [*(19 * [True]), False], "grace": 20 * [False]}
ABILITY = {
    "edited_models": 3,
    "perplexity": {"before": 20.0, "after": 21.5, "worst": 30.25},
    "kl": 0.1,
    "choices": {
        "task": "nano_choices", "metric": "acc", "documents": 120, "before": 1.0, "after": 0.975,
        "low": -0.05, "p": 0.25, "margin": 0.05, "needed": 300, "not_inferior": False,
    },
}  # fmt: skip


def cell_of(method: str) -> Cell:
    return Cell("nano", "nano_facts", "single", method, 20, "data")


def finish(cell: Cell, held: list[bool], folder: Path) -> None:
    """Write what a finished cell leaves."""
    own = folder / "cells" / cell.name
    own.mkdir(parents=True)
    lines = []
    for at, right in enumerate(held):
        after = {"tf_all": right, "tf_tok": float(right), "text": "Rome" if right else "Paris"}
        base = {"text": "Rome", "tf_all": True}
        probes = [
            probe("rewrite", None, after),
            probe("locality", "neighborhood", {"tf_all": at % 2 == 0, "top1": [1]}, base),
        ]
        own_cost = {"timing": {"edit_seconds": 0.5}, "edit": {"bytes": 10.0}}
        lines.append(line_of(example(str(at), probes, subject=f"s{at}", **own_cost)))
    (own / "results.jsonl").write_bytes(b"".join(lines))
    protocol = Protocol(mode="single")
    name = {config: name for name, config in methods().items()}[cell.method]
    facts = {
        "format": 1,
        "method": {"name": name},
        "base_model": {"fingerprint": "f"},
        "dataset": {"sha256": "d", "records": len(held)},
        "protocol": {**protocol.facts(), "id": protocol.id},
        "metric_protocol": {"scoring": "default"},
        "timing": {"edit_seconds": {"mean": 0.5}},
        "versions": {"torch": "2.13"},
        "seed": 0,
    }
    (own / "results.json").write_text(json.dumps(facts))
    (own / "config.yaml").write_text(f"output: {own}\n")
    (own / "ability_sample.json").write_text(json.dumps(ABILITY))
    mark = {"name": cell.name, "command": cell.command, "processor_seconds": 12.0}
    (own / MARK).write_text(json.dumps({**mark, "peak_bytes": 5 * 10**8}))


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("benchmark")
    for method, held in HELD.items():
        finish(cell_of(method), held, folder)
    failed = cell_of("rome")
    (folder / "cells" / failed.name).mkdir()
    mark = {"name": failed.name, "command": failed.command, "processor_seconds": 1.0}
    mark |= {"peak_bytes": 1, "error": "layer <9> is not there"}
    (folder / "cells" / failed.name / MARK).write_text(json.dumps(mark))
    found = plan(True, "none", models=["nano"])
    cells = tuple(cell_of(method) for method in ("memit", "grace", "ftm", "rome", "lora"))
    return collected(type(found)(found.sweeps, cells, found.skipped), folder, True)


def test_pairs_that_cannot_be_told_apart_are_those_of_the_comparison(
    content: dict[str, Any],
) -> None:
    (table,) = content["tables"]
    assert table["alike"]["rewrite/gen_em"] == [["MEMIT", "FTM"]]
    assert len(table["alike"]["locality/neighborhood/known"]) == 3
    assert content["missing"] == ["nano.nano_facts.single.lora"]
    cells = {cell["method"]: cell for cell in content["cells"]}
    assert cells["MEMIT"]["scores"]["rewrite/gen_em"]["mean"] == 0.95
    assert cells["GRACE"]["scores"]["locality/neighborhood/known"]["mean"] == 0.5
    assert cells["MEMIT"]["config"] == "output: runs/nano.nano_facts.single.memit\n"
    assert cells["ROME"]["error"] == "layer <9> is not there"


def test_the_page_shows_them_in_the_order_of_the_alphabet(content: dict[str, Any]) -> None:
    text = page(content)
    rows = re.findall(r'<tr class="row" data-method="(\w+)">(.*?)</tr>', text, re.DOTALL)
    assert [name for name, _ in rows] == ["FTM", "GRACE", "MEMIT"]
    near = {name: re.findall(r'data-alike="([^"]*)"', row)[0] for name, row in rows}
    assert near == {"FTM": "MEMIT", "MEMIT": "FTM", "GRACE": ""}
    assert "rewrite: FTM" in text
    assert "layer &lt;9&gt; is not there" in text
    for method in HELD:
        assert html.escape(cell_of(method).command) in text
    assert "0.75 – 1.00" in text or "0.85 – 1.00" in text
    assert "before 20.0, worst 30.2" in text
    assert "cannot claim, needs 300" in text
    assert not re.search(r'(?:src|href)="https?:', text)


def test_a_summary_has_the_figures_of_each_method(content: dict[str, Any]) -> None:
    text = summary(content)
    assert "| `MEMIT` | 0.95 (" in text
    assert "| `GRACE` | 0.00 (" in text
    assert "nano_facts, single, 20 facts, of 3 pairs cannot be told apart: rewrite 1" in text
    assert "1 of 5 cells were not run" in text


def test_files_of_the_page_say_the_same(content: dict[str, Any], tmp_path: Path) -> None:
    write_page(content, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == content
    assert (tmp_path / "index.html").read_text() == page(content)


def test_the_page_of_the_repository_is_that_of_its_numbers() -> None:
    folder = ROOT / "docs" / "leaderboard"
    content = json.loads((folder / "results.json").read_text())
    assert (folder / "index.html").read_text() == page(content)
    assert content["cells"]
