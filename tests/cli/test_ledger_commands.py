"""`kedit edit --ledger`, and the commands that read and change a ledger."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kedit_lightning import BaseModel, EditRequest, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cli.main import main
from kedit_lightning.data import NanoFacts, Requests
from kedit_lightning.errors import (
    EditOrderError,
    InvalidRequestError,
    LedgerError,
    UnsupportedUseError,
)
from kedit_lightning.methods import FTM, MEMIT
from kedit_lightning.runs import Ledger
from kedit_lightning.runs.ledger_stream import ledger_stream

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*facts? stands? in",
    "ignore::kedit_lightning.errors.FactsNotWrittenWarning",
    "ignore:.*contradictory targets",
)
SETTINGS: dict[str, Any] = {"lr": 1e-2, "steps": 8}
FACTS = [
    {"prompt": r.prompt, "target_new": r.target_new, "subject": r.subject}
    for example in NanoFacts(limit=3).examples("test")
    for r in example.requests
]


def facts(folder: Path, records: list[dict[str, Any]]) -> Requests:
    path = folder / f"facts-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(records))
    return Requests(path=path)


def write(base: BaseModel, ledger: Path, data: Requests, **protocol: Any) -> None:
    asked = Protocol(**{"mode": "sequential", "generate": False, **protocol})
    trainer = EditTrainer(protocol=asked, accelerator="cpu")
    trainer.edit(FTM(base_model=base, **SETTINGS), data, ledger=ledger)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.load("nano")


@pytest.fixture(scope="module")
def written(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write(base, folder / "ledger", facts(folder, FACTS))
    return folder / "ledger"


@pytest.fixture
def ledger(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "ledger"))


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_a_run_writes_each_edit(ledger: Path, base: BaseModel) -> None:
    lines = Ledger(ledger).lines
    assert [line.number for line in lines] == [1, 2, 3]
    assert base.edits.ids == ()


def test_the_same_command_again_writes_nothing(
    ledger: Path, base: BaseModel, tmp_path: Path
) -> None:
    before = (ledger / "ledger.jsonl").read_bytes()
    write(base, ledger, facts(tmp_path, FACTS))
    assert (ledger / "ledger.jsonl").read_bytes() == before


def test_a_run_that_was_ended_goes_on(ledger: Path, base: BaseModel, tmp_path: Path) -> None:
    whole = Ledger(ledger).lines
    path = ledger / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]) + b'{"cut')
    Ledger(ledger).edit_path(whole[2].edit.id).unlink()
    write(base, ledger, facts(tmp_path, FACTS))
    assert [line.id for line in Ledger(ledger).lines] == [line.id for line in whole]


def test_other_facts_go_on_top(ledger: Path, base: BaseModel, tmp_path: Path) -> None:
    fresh = {"prompt": "The Eiffel Tower is in", "target_new": "Rome", "subject": "Eiffel Tower"}
    with pytest.warns(UserWarning, match="1 fact stands"):
        write(base, ledger, facts(tmp_path, [FACTS[0], fresh]))
    found = Ledger(ledger)
    assert [r.prompt for r in found.requests][3:] == [fresh["prompt"]]
    assert all(one.equal for one in found.replay(base))


def test_facts_are_compared_before_anything_is_computed(
    ledger: Path, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequestError, match="all of these facts"):
        write(base, ledger, facts(tmp_path, FACTS[:2]))
    other = {**FACTS[0], "target_new": "chess"}
    with pytest.raises(InvalidRequestError, match="contradictory targets"):
        write(base, ledger, facts(tmp_path, [other]), on_conflict="refuse")
    assert len(Ledger(ledger).lines) == 3


def test_edits_apart_from_each_other_are_refused(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedUseError, match="stand on each other"):
        write(base, tmp_path / "ledger", facts(tmp_path, FACTS), mode="single")
    with (
        pytest.raises(UnsupportedUseError, match="written by one process, and the run has 2"),
        ledger_stream(tmp_path / "ledger", None, None, processes=2),
    ):
        pass
    with pytest.raises(UnsupportedUseError, match="leave out --output"):
        EditTrainer(accelerator="cpu").edit(
            FTM(base_model=base, **SETTINGS),
            facts(tmp_path, FACTS),
            output=tmp_path / "run",
            ledger=tmp_path / "ledger",
        )
    with (
        FTM(base_model=base, **SETTINGS).edit([EditRequest("Rome is in", "Peru", "Rome")]),
        pytest.raises(EditOrderError, match="roll them back"),
    ):
        write(base, tmp_path / "ledger", facts(tmp_path, FACTS[:1]))


def test_the_commands(ledger: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, prompt = str(ledger), FACTS[1]["prompt"]
    assert "3 edits of 3 facts stand" in said(capsys, "log", folder)
    assert f"prompt: {prompt}" in said(capsys, "show", folder, "2")
    assert "3 of 3 edits equal" in said(capsys, "replay", folder)
    assert f"line 2: {prompt!r}" not in said(capsys, "check", folder)
    blamed = said(capsys, "blame", folder, prompt)
    assert blamed.index("line 2: +") > 0
    reverted = said(capsys, "revert", folder, "2")
    assert "line 2 is reverted, by line 4; computed again without it: line 3" in reverted
    assert said(capsys, "log", folder).count("FTM (reverted)") == 1
    assert said(capsys, "diff", folder, "3", "4").startswith("- line 2")
    assert said(capsys, "diff", folder, "4", "4") == "the states are equal\n"
    assert "reverted already" in said(capsys, "revert", folder, "2", code=2)
    assert "there is no ledger" in said(capsys, "log", str(tmp_path), code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["log", "{file}"], "cannot be read as a ledger (Not a directory)"),
        (["log", ""], "the name of the ledger is empty"),
        (["blame", "{ledger}", "A", "--max_new_tokens", "-3"], "must be at least 1, got -3"),
        (["export", "{ledger}", "{file}/x"], "cannot be written to (Not a directory)"),
        (["export", "{ledger}", "{ledger}/x"], "lies in the ledger"),
        (["tasks", "safety"], "kedit tasks takes no arguments, got ['safety']"),
        (["metrics", "--all"], "kedit metrics takes no arguments"),
    ],
)
def test_wrong_words_are_told(words, said, written, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        main([word.format(file=file, ledger=written) for word in words])
    told = capsys.readouterr()
    assert stop.value.code == 2
    assert said in told.out + told.err


@pytest.mark.parametrize("command", ["log", "compare", "data", "tasks"])
def test_help_of_a_command_that_reports(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert command in capsys.readouterr().out


def test_a_ledger_needs_a_name_that_is_a_folder(base, tmp_path):
    data = facts(tmp_path, FACTS)
    with pytest.raises(UnsupportedUseError, match="name of the ledger is empty"):
        write(base, "", data)  # type: ignore[arg-type]
    with pytest.raises(LedgerError, match="a ledger is a folder"):
        write(base, Path(data.path), data)


def test_check_names_the_edit_that_a_fact_was_lost_with(base: BaseModel, tmp_path: Path) -> None:
    strong = FTM(base_model=base, lr=1e-2, steps=8)
    ledger, (first, second) = Ledger(tmp_path / "ledger"), FACTS[:2]
    ledger.append(strong, [EditRequest(**first)])
    ledger.append(strong, [EditRequest(**{**first, "prompt": "Say: " + first["prompt"]})])
    other = EditRequest(**{**first, "target_new": "chess"})
    ledger.append(strong, [other])
    ledger.append(FTM(base_model=base, lr=1e-9, steps=1), [EditRequest(**second)])
    states = [(one.number, one.state, one.by) for one in ledger.check(base)]
    assert states[0] == (1, "overwritten", 3)
    assert states[1] == (2, "lost", 3)
    assert states[2] == (3, "holds", None)
    assert states[3] == (4, "not written", None)


# peft asks for what transformers has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.slow
def test_thirty_facts(base: BaseModel, tmp_path: Path) -> None:
    """Written, one reverted, two added, checked, exported: other tools answer the same."""
    requests = [r for e in NanoFacts(limit=32).examples("test") for r in e.requests]
    ledger, method = Ledger(tmp_path / "ledger"), MEMIT(base_model=base)
    for part in (requests[:10], requests[10:11], requests[11:30]):
        ledger.append(method, part)
    ledger.revert(2, base)
    for request in requests[30:]:
        ledger.append(method, [request])
    checked = ledger.check(base)
    assert [one.request for one in checked] == requests[:10] + requests[11:]
    assert sum(one.holds for one in checked) >= 28
    folder = tmp_path / "edited"
    for option in ([], ["--adapter"], ["--gguf_lora"]):
        with pytest.raises(SystemExit) as left:
            main(["export", str(ledger.path), str(folder), *option])
        assert left.value.code == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    prompts = [r.prompt for r in requests]
    answers = EditTrainer(accelerator="cpu").predict(
        method, edits=ledger.path, prompt=prompts, verbose=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    base.model.save_pretrained(tmp_path / "base")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(fresh, str(folder / "adapter")).eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for model in (plain, adapted):
            said = model.generate(input_ids=ids, do_sample=False, max_new_tokens=12)
            text = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert text.startswith(answer["edited"].strip().rstrip(".")), prompt
        with ledger.applied(base), torch.no_grad():
            assert torch.allclose(plain(ids).logits, base.model(ids).logits, atol=1e-3)
            assert torch.allclose(adapted(ids).logits, base.model(ids).logits, atol=1e-3)
    gguf = pytest.importorskip("gguf", reason="the extra 'gguf' is not installed")
    tensors = {t.name: t.data for t in gguf.GGUFReader(folder / "gguf-lora/adapter.gguf").tensors}
    written = [n for n in adapted.state_dict() if n.endswith("down_proj.lora_A.default.weight")]
    assert len(tensors) == 2 * len(written) > 2
    for name in written:
        block = f"blk.{name.split('.layers.')[1].split('.')[0]}.ffn_down.weight"
        for part, held in (("lora_a", name), ("lora_b", name.replace("lora_A", "lora_B"))):
            assert (adapted.state_dict()[held].numpy() == tensors[f"{block}.{part}"]).all()


KEDIT = str(Path(sys.executable).with_name("kedit"))
#: How often the command is killed.
KILLS = int(os.environ.get("KEDIT_KILLS", "2"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_command_is_given_again(tmp_path: Path) -> None:
    """Killed at random moments, and given again each time, it ends like an unbroken one."""
    chance = random.Random(0)

    def start(name: str) -> subprocess.Popen[bytes]:
        line = [KEDIT, "edit", "-c", "methods/memit", "-c", "data/nano_facts", "--data.limit=6"]
        line += ["--trainer.protocol.mode=sequential", "--trainer.accelerator=cpu"]
        environment = {**os.environ, "KEDIT_CACHE": str(tmp_path / "cache")}
        line += ["--ledger", str(tmp_path / name), "--trainer.protocol.max_new_tokens=4"]
        return subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)

    def lines(name: str) -> int:
        file = tmp_path / name / "ledger.jsonl"
        return file.read_bytes().count(b"\n") if file.is_file() else 0

    assert start("whole").wait(300) == 0
    killed_after = []
    for _ in range(KILLS):
        goal = min(lines("killed") + chance.randint(0, 1 + 6 // KILLS), 5)
        process = start("killed")
        while process.poll() is None and lines("killed") < goal:
            time.sleep(0.001)
        time.sleep(chance.random() * (0.05 if goal else 5))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        killed_after.append(lines("killed"))
    assert killed_after == sorted(killed_after)
    assert killed_after[-1] < 6
    assert start("killed").wait(300) == 0
    whole, killed = (Ledger(tmp_path / name) for name in ("whole", "killed"))
    assert [line.id for line in killed.lines] == [line.id for line in whole.lines]
    for saved in whole.standing.values():
        assert killed.edit_path(saved.id).read_bytes() == whole.edit_path(saved.id).read_bytes()
