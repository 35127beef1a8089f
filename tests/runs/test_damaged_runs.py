"""Folders that are in use, cannot be written to, or are damaged: a sentence and a way out."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from data_support import fact, write
from mutations import mutated_bytes
from support import tiny_base
from toys import Toy

from kedit_lightning import EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Requests
from kedit_lightning.errors import KEditError, OutputFolderError, ResumeError
from kedit_lightning.runs import folder_claim
from kedit_lightning.runs.folder_claim import claimed
from kedit_lightning.runs.saved_stack import load_stack

FACTS = [
    fact(id=str(i), prompt=f"{name} lies in", subject=name)
    for i, name in enumerate(("Amber Falls", "Lyon", "Rome", "Berlin", "Warsaw"))
]


def run(
    folder: Path, records: Path, resume: bool = False, mode: Any = "single", **toy: Any
) -> None:
    protocol = Protocol(mode=mode, chunk_size=2, generate=False)
    trainer = EditTrainer(accelerator="cpu", protocol=protocol)
    where = {"resume" if resume else "output": folder}
    method = Toy(base_model=tiny_base("llama"), **toy)
    trainer.test(method, Requests(path=records), verbose=False, **where)


def sentence(error: BaseException) -> str:
    message = "; ".join([str(error), *getattr(error, "__notes__", ())])
    assert message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(folder / "run", write(folder / "facts.jsonl", *FACTS))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ---- two runs in one folder


def test_a_second_run_is_told_of_the_first(tmp_path, copy):
    for folder, resume in ((tmp_path / "new", False), (copy / "run", True)):
        with claimed(folder, create=True), pytest.raises(OutputFolderError) as caught:
            run(folder, copy / "facts.jsonl", resume)
        message = sentence(caught.value)
        assert f"{folder} is in use by another run (process {os.getpid()} on" in message
        assert "python" in message
    run(tmp_path / "new", copy / "facts.jsonl")  # it is free again
    run(copy / "run", copy / "facts.jsonl", resume=True)


def test_the_claim_ends_with_its_process(tmp_path):
    # Without the package around it, which takes seconds to import.
    code = (
        "import sys, time; from pathlib import Path; from importlib import util\n"
        "spec = util.spec_from_file_location('folder_claim', sys.argv[1])\n"
        "module = util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "with module.claimed(Path(sys.argv[2]), create=True):\n"
        "    print('claimed', flush=True); time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", code, folder_claim.__file__, str(tmp_path / "run")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        told = rf"\(process {process.pid} on .*, started at .*\)"
        with (
            pytest.raises(OutputFolderError, match=told) as caught,
            claimed(tmp_path / "run", create=True),
        ):
            pass
        sentence(caught.value)
        process.send_signal(signal.SIGKILL)
    with claimed(tmp_path / "run", create=True):
        pass


# ---- places that cannot be written to


@pytest.mark.parametrize("name", ["file", "file/below", "nul\0", "x" * 300])
def test_an_output_that_cannot_be_a_folder(name, tmp_path, finished):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputFolderError, match="cannot be used as an output folder"):
        run(tmp_path / name, finished / "facts.jsonl")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_keeps_what_is_finished(tmp_path, copy):
    whole = (copy / "run/results.jsonl").read_bytes()
    size = len(whole) * 3 // 5
    assert size > max(path.stat().st_size for path in (copy / "run/edits").iterdir())
    with files_of_at_most(size), pytest.raises(OutputFolderError) as caught:
        run(tmp_path / "run", copy / "facts.jsonl")
    message = sentence(caught.value)
    assert f"{tmp_path}/run/results.jsonl could not be written (File too large)" in message
    assert f"--resume {tmp_path}/run" in message
    run(tmp_path / "run", copy / "facts.jsonl", resume=True)
    assert scores(tmp_path / "run") == scores(copy / "run")


@pytest.mark.parametrize("size", [0, 10, 600, 900])
def test_a_full_disk_is_told_whatever_is_written_first(size, tmp_path, finished):
    with files_of_at_most(size), pytest.raises(OutputFolderError, match="could not be written"):
        run(tmp_path / "run", finished / "facts.jsonl")


def scores(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    return {"scores": found["scores"], "stack": json.loads((folder / "stack.json").read_text())}


# ---- Ctrl-C


@pytest.mark.parametrize("at", ["Amber", "Rome"])
def test_ctrl_c_says_what_is_kept(at, tmp_path, finished, monkeypatch, capsys):
    compute = Toy.compute_edit

    def interrupted(self: Toy, requests: Any) -> Any:
        if at in requests[0].prompt:
            raise KeyboardInterrupt
        return compute(self, requests)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "compute_edit", interrupted)
        with pytest.raises(SystemExit) as caught:
            run(tmp_path / "run", finished / "facts.jsonl")
    signal.signal(signal.SIGINT, handler)
    assert caught.value.code == 130
    said = capsys.readouterr().err
    kept = 0 if at == "Amber" else 2
    assert f"interrupted: finished examples are kept, {kept} of them" in said
    assert f"--resume {tmp_path}/run" in said
    run(tmp_path / "run", finished / "facts.jsonl", resume=True)
    assert scores(tmp_path / "run") == scores(finished / "run")


# ---- more or fewer records


def test_a_run_goes_on_with_more_or_fewer_records(copy):
    folder, facts = copy / "run", copy / "facts.jsonl"
    for mode in ("single", "batch", "sequential"):
        shutil.rmtree(folder)
        long = fact(id="long", prompt=f"{'Rome is in Italy. ' * 40}Amber Falls lies in")
        write(facts, *FACTS[:2], fact(id="bad", prompt="Anna lies in", subject="Anna"), FACTS[4])
        with pytest.raises(KEditError, match="fails on purpose"):
            run(folder, facts, mode=mode, fail_on="Anna")
        assert len((folder / "results.jsonl").read_text().splitlines()) == 2
        write(facts, *FACTS, FACTS[0] | {"id": "more", "prompt": "Amber Falls is in"})
        with pytest.raises(ResumeError, match="fail_on"):
            run(folder, facts, resume=True, mode=mode)
        settings = json.loads((folder / "run.json").read_text())
        settings["method"]["settings"]["fail_on"] = None
        (folder / "run.json").write_text(json.dumps(settings))
        edits = list((folder / "edits").iterdir())
        run(folder, facts, resume=True, mode=mode)
        unbroken = copy / mode
        run(unbroken, facts, mode=mode)
        found, wanted = scores(folder), scores(unbroken)
        assert found["scores"] == wanted["scores"]
        assert len(found["stack"]["edits"]) == len(wanted["stack"]["edits"]) > len(edits)
        assert long["id"] == "long"


def test_scored_records_must_be_what_they_were(copy):
    folder, facts = copy / "run", copy / "facts.jsonl"
    for changed, told in (
        (FACTS[1:], "record '0' is not in the data any more"),
        ([{**FACTS[0], "target_new": "Italy"}, *FACTS[1:]], "record '0' has changed"),
        ([{**FACTS[0], "subject": "Falls"}, *FACTS[1:]], "what edit 0 writes has changed"),
    ):
        write(facts, *changed)
        with pytest.raises(ResumeError, match=told) as caught:
            run(folder, facts, resume=True)
        sentence(caught.value)
    write(facts, *FACTS[::-1])
    run(folder, facts, resume=True)


def test_chunks_and_final_scores_must_be_what_they_were(copy):
    facts = copy / "facts.jsonl"
    run(copy / "batch", facts, mode="batch")
    run(copy / "sequential", facts, mode="sequential")
    write(facts, *FACTS[1:], FACTS[0])
    with pytest.raises(ResumeError, match="edited in chunk-00000 and would be in another chunk"):
        run(copy / "batch", facts, resume=True, mode="batch")
    write(facts, *FACTS, fact(id="more"))
    with pytest.raises(ResumeError, match="was scored after its last edit"):
        run(copy / "sequential", facts, resume=True, mode="sequential")


# ---- damage

STRANGE = (b"", b"{", b"[]", b"5", b"{}", b"null", b"[" * 9999, b"\xff\xfe", b'{"protocol": {}}')


@pytest.mark.parametrize("content", STRANGE, ids=lambda content: repr(content[:12]))
def test_damaged_settings_are_named(content, copy):
    (copy / "run/run.json").write_bytes(content)
    with pytest.raises(ResumeError, match=r"run\.json is damaged .*put back a copy") as caught:
        run(copy / "run", copy / "facts.jsonl", resume=True)
    sentence(caught.value)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "content", [*STRANGE, b'{"id": 5, "stage": []}'], ids=lambda c: repr(c[:9])
)
def test_a_damaged_line_is_named_by_its_number(content, old, copy):
    path = copy / "run/results.jsonl"
    lines = path.read_bytes().split(b"\n")
    if old:  # as releases without hashes have written them
        records = [json.loads(line) for line in lines[:-1]]
        lines = [
            json.dumps({**r, "digest": 0}).replace(', "digest": 0', "").encode() for r in records
        ]
        lines.append(b"")
    lines[2] = content
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ResumeError, match=r"line 3 of .*results\.jsonl is damaged") as caught:
        run(copy / "run", copy / "facts.jsonl", resume=True)
    sentence(caught.value)


def test_a_changed_number_in_a_line_is_noticed(copy):
    path = copy / "run/results.jsonl"
    content = path.read_text()
    at = content.index('"log_prob": -') + len('"log_prob": -')
    path.write_text(content[:at] + str((int(content[at]) + 1) % 10) + content[at + 1 :])
    with pytest.raises(ResumeError, match="line 1 of"):
        run(copy / "run", copy / "facts.jsonl", resume=True)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))  # the way out
    run(copy / "run", copy / "facts.jsonl", resume=True)
    assert len(path.read_text().splitlines()) == len(FACTS)


def test_a_damaged_edit_that_has_scores_names_the_way_out(copy):
    path = copy / "run/edits/1.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        KEditError, match=r"edits/1\.safetensors .*delete it and the lines with its name"
    ) as caught:
        run(copy / "run", copy / "facts.jsonl", resume=True)
    sentence(caught.value)
    path.unlink()
    results = copy / "run/results.jsonl"
    lines = [
        line for line in results.read_text().splitlines(True) if '"edit_name": "1"' not in line
    ]
    results.write_text("".join(lines))
    run(copy / "run", copy / "facts.jsonl", resume=True)
    assert scores(copy / "run")["scores"]


# ---- mutations


def mutated(folder: Path, chance: random.Random) -> Path:
    """Change one file of a folder; returns it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    path = chance.choice(files)
    path.write_bytes(mutated_bytes(path.read_bytes(), chance))
    return path


def uses(folder: Path, facts: Path, wanted: dict[str, Any]) -> None:
    """Resume the run and read its edits: either a sentence, or what an unbroken run gives."""
    try:
        run(folder, facts, resume=True)
        assert scores(folder) == wanted
    except KEditError as error:
        sentence(error)
    try:
        edits = load_stack(folder, tiny_base("llama"))
        assert [edit.id for edit in edits] == [entry["id"] for entry in wanted["stack"]["edits"]]
    except KEditError as error:
        sentence(error)


COUNT = int(os.environ.get("KEDIT_MUTATIONS", "60"))


@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, COUNT), marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_mutated_folders_give_a_sentence_or_a_right_run(seeds, finished, tmp_path):
    wanted = scores(finished / "run")
    for seed in seeds:
        folder = tmp_path / str(seed)
        shutil.copytree(finished / "run", folder)
        chance = random.Random(seed)
        path = mutated(folder, chance)
        start = time.perf_counter()
        try:
            uses(folder, finished / "facts.jsonl", wanted)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {path.name}") from error
        assert time.perf_counter() - start < 60
        shutil.rmtree(folder)
