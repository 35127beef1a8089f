"""A run that was broken off anywhere ends like one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from places import SAMPLES, TESTS
from run_folders import assert_equal, content, progress
from support import tiny_base
from toys import Toy

from kedit_lightning import EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import CounterFact, Requests
from kedit_lightning.errors import NonFiniteError, ResumeError
from kedit_lightning.methods import ROME
from kedit_lightning.runs import OutputFolder

DATA = SAMPLES / "counterfact_nested.json"
# A chunk broken off, a score after two edits, and the final score.
MORE = [("single", 4), ("batch", 2), ("sequential", 1), ("sequential", 5), ("sequential", 13)]
MODES = ("single", "batch", "sequential")


def run(folder: Path, mode: Any = "single", resume: bool = False, **settings: Any) -> None:
    protocol = Protocol(
        mode=mode,
        chunk_size=2,
        max_new_tokens=4,
        every=2 if mode == "sequential" else None,
        answers=settings.pop("answers", "words"),
    )
    method = Toy(base_model=settings.pop("base", None) or tiny_base("llama"), noise=0.01)
    method.hparams.update(settings)
    trainer = EditTrainer(accelerator="cpu", protocol=protocol)
    where = {"resume" if resume else "output": folder}
    trainer.test(method, CounterFact(path=DATA), verbose=False, **where)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Gives what a run of a mode writes that is not broken off."""

    @cache
    def written(mode: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(mode) / "run"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KEDIT_CACHE", str(folder.parent / "cache"))
            run(folder, mode)
        return content(folder)

    return written


@pytest.mark.parametrize(
    ("mode", "stop"),
    [
        *[("single", 1), ("batch", 1), ("sequential", 3)],
        *[pytest.param(mode, stop, marks=pytest.mark.slow) for mode, stop in MORE],
    ],
)
def test_a_run_broken_off_after_any_record_can_be_continued(
    mode: Any,
    stop: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: Callable[[str], dict[str, Any]],
) -> None:
    class Broken(BaseException):
        pass

    expected = unbroken(mode)
    append = OutputFolder.append
    written: list[int] = []

    def breaking(self: OutputFolder, record: Any) -> None:
        append(self, record)
        written.append(1)
        if len(written) == stop:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "append", breaking)
        with pytest.raises(Broken):
            run(tmp_path / "run", mode)
    with (tmp_path / "run/results.jsonl").open("a") as file:
        file.write('{"id": "broken li')  # as a crash in the middle of a write would leave it
    Toy.computed.clear()
    run(tmp_path / "run", mode, resume=True)
    assert_equal(content(tmp_path / "run"), expected)
    # What was saved is not computed again; the two edits of a chunk are made before its records.
    saved = {
        "single": stop + stop % 2,
        "batch": 1,
        "sequential": {1: 1, 3: 1, 5: 2, 13: 3}.get(stop),
    }[mode]
    assert len(Toy.computed) == {"single": 5, "batch": 3, "sequential": 3}[mode] - saved


@pytest.mark.parametrize("mode", [*MODES[:2], pytest.param(MODES[2], marks=pytest.mark.slow)])
def test_a_finished_run_can_be_continued(
    mode: Any, tmp_path: Path, unbroken: Callable[[str], dict[str, Any]]
) -> None:
    run(tmp_path / "run", mode)
    Toy.computed.clear()
    run(tmp_path / "run", mode, resume=True)
    assert Toy.computed == []
    assert_equal(content(tmp_path / "run"), unbroken(mode))


@pytest.mark.parametrize(("place", "stop"), [("save_edit", 1), ("append", 2)])
def test_edits_that_are_computed_together_are_so_again(
    place: str, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values found for some facts of a chunk alone would round in another way."""

    class Broken(BaseException):
        pass

    def run(folder: Path, **where: Path) -> None:
        rome = ROME(
            base_model=tiny_base("llama"), statistics="identity", steps=2, contexts=1, layer=1
        )
        protocol = Protocol(mode="single", chunk_size=4, generate=False)
        trainer = EditTrainer(accelerator="cpu", protocol=protocol)
        trainer.test(
            rome, CounterFact(path=DATA, limit=3), verbose=False, **where or {"output": folder}
        )

    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache of whole"))
    run(tmp_path / "whole")
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache of broken"))
    done, kept = [], getattr(OutputFolder, place)

    def breaking(self: OutputFolder, *given: Any) -> None:
        kept(self, *given)
        done.append(1)
        if len(done) == stop:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, place, breaking)
        with pytest.raises(Broken):
            run(tmp_path / "broken")
    run(tmp_path / "broken", resume=tmp_path / "broken")
    assert_equal(content(tmp_path / "broken"), content(tmp_path / "whole"))


def test_after_an_error_the_cause_can_be_removed(tmp_path: Path) -> None:
    base = tiny_base("llama")
    with pytest.raises(NonFiniteError):
        run(tmp_path / "run", base=base, fail_on="Percy Lund")
    with pytest.raises(ResumeError, match=r"fail_on: 'Percy Lund' -> None"):
        run(tmp_path / "run", base=base, resume=True)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path / "run")
    before = (tmp_path / "run/results.jsonl").read_bytes()
    with pytest.raises(ResumeError) as caught:
        run(tmp_path / "run", "batch", resume=True, strength=7.0, base=tiny_base("gpt2"))
    for difference in (
        "base_model.name: 'llama' -> 'gpt2'",
        "method.settings.strength: 30.0 -> 7.0",
        "protocol.mode: 'single' -> 'batch'",
    ):
        assert difference in str(caught.value)
    assert (tmp_path / "run/results.jsonl").read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*contradictory targets")
@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_more_records_may_follow_a_fact_that_was_overwritten(mode: Any, tmp_path: Path) -> None:
    prompts = ["Bolt is in", "Bolt is in", "Lyon is in", "Amber Falls lies in"]
    facts = [{"prompt": p, "target_new": t} for p, t in zip(prompts, "ABCD", strict=True)]
    data = tmp_path / "facts.json"
    protocol = Protocol(mode=mode, chunk_size=2, max_new_tokens=4, evaluate="immediate")

    def test(count: int, **where: Path) -> Any:
        data.write_text(json.dumps(facts[:count]))
        trainer = EditTrainer(accelerator="cpu", protocol=protocol)
        trainer.test(Toy(base_model=tiny_base("llama")), Requests(data), verbose=False, **where)

    test(4, output=tmp_path / "whole")
    test(2, output=tmp_path / "grown")
    test(4, resume=tmp_path / "grown")
    assert content(tmp_path / "grown")["lines"] == content(tmp_path / "whole")["lines"]


def test_a_run_that_names_no_rule_for_answers_was_scored_by_squads(tmp_path: Path) -> None:
    run(tmp_path / "run", answers="squad")
    whole, facts = content(tmp_path / "run"), json.loads((tmp_path / "run/run.json").read_text())
    del facts["protocol"]["answers"]
    (tmp_path / "run/run.json").write_text(json.dumps(facts))
    with pytest.raises(ResumeError, match=r"protocol.answers: 'squad' -> 'words'"):
        run(tmp_path / "run", resume=True)
    run(tmp_path / "run", resume=True, answers="squad")
    assert_equal(content(tmp_path / "run"), whole)


def test_there_must_be_something_to_continue(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no run to continue"):
        run(tmp_path / "nothing", resume=True)
    with pytest.raises(ResumeError, match="leave out --output"):
        EditTrainer(accelerator="cpu").test(
            Toy(base_model="nosuch"), CounterFact(path=DATA), output="a", resume="b"
        )


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    run(tmp_path / "run")
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    lines[1] = lines[1][:40]
    (tmp_path / "run/results.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ResumeError, match=r"line 2 of .*results\.jsonl"):
        run(tmp_path / "run", resume=True)


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_resume import run
run(Path({folder!r}), {mode!r}, resume={resume})
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", ["single", "sequential"])
def test_killed_at_three_random_moments(
    mode: Any, tmp_path: Path, unbroken: Callable[[str], dict[str, Any]]
) -> None:
    folder = tmp_path / "run"
    chance = random.Random(mode)
    environment = {**os.environ, "KEDIT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    here = str(Path(__file__).parent)
    for attempt in range(3):
        code = SCRIPT.format(
            tests=str(TESTS),
            here=here,
            folder=str(folder),
            mode=mode,
            resume=bool(attempt),
        )
        goal = progress(folder) + chance.randint(1, 3)
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        while process.poll() is None and progress(folder) < goal:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was not over
    assert not (folder / "results.json").exists()
    run(folder, mode, resume=True)
    assert_equal(content(folder), unbroken(mode))
