"""Damaged checkpoints are refused in one sentence that names the file, or are loaded whole."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_support import fact, write
from mutations import mutated_bytes
from support import REQUESTS, tiny_base

from kedit_lightning import EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Requests
from kedit_lightning.errors import CheckpointError, KEditError
from kedit_lightning.methods import MEND

COUNT = int(os.environ.get("KEDIT_MUTATIONS", "60"))
PROTOCOL = Protocol(generate=False)
FACT = fact(rephrases=["Amber Falls is in"], locality={"near": [{"prompt": "Rome is in"}]})


def quiet(**settings: Any) -> EditTrainer:
    return EditTrainer(accelerator="cpu", usual_callbacks=False, protocol=PROTOCOL, **settings)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and facts."""
    folder = tmp_path_factory.mktemp("work")
    facts = write(folder / "facts.jsonl", FACT)
    trainer = quiet(max_epochs=1, enable_checkpointing=False)
    method = MEND(tiny_base("llama"), rank=4)
    trainer.fit(method, datamodule=Requests(train_path=facts))
    trainer.save_checkpoint(folder / "fit.ckpt")
    return folder


def loaded(path: Path, work: Path, how: str) -> dict[str, torch.Tensor]:
    """The networks, loaded by a setting or by the trainer."""
    base = tiny_base("llama")
    if how == "checkpoint":
        method = MEND(base, checkpoint=str(path))
        method.edit(REQUESTS[:1])
    else:
        method = MEND(base, rank=4)
        quiet().test(method, Requests(path=work / "facts.jsonl"), path, verbose=False)
    return method.state_dict()


def refused(path: Path, work: Path, how: str) -> str:
    with pytest.raises(KEditError) as caught:
        loaded(path, work, how)
    message = str(caught.value)
    assert "\n" not in message
    return message


BOTH = pytest.mark.parametrize("how", ["checkpoint", "ckpt_path"])


@BOTH
def test_a_whole_checkpoint_is_loaded(how, work):
    saved = torch.load(work / "fit.ckpt", weights_only=True)["state_dict"]
    found = loaded(work / "fit.ckpt", work, how)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())


@BOTH
@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04\0", "cut", "flipped"], ids=repr)
def test_files_that_are_none_are_named(content, how, work, tmp_path):
    whole = bytearray((work / "fit.ckpt").read_bytes())
    if content == "cut":
        content = bytes(whole[: len(whole) // 2])
    if content == "flipped":  # in a tensor, where torch would not notice
        tensor = torch.load(work / "fit.ckpt", weights_only=True)["state_dict"]
        values = max(tensor.values(), key=lambda t: t.numel()).numpy().tobytes()
        whole[whole.index(values) + 5] ^= 0x40
        content = bytes(whole)
    (tmp_path / "x.ckpt").write_bytes(content)
    message = refused(tmp_path / "x.ckpt", work, how)
    assert f"'{tmp_path}/x.ckpt' is " in message
    assert "take it from a copy" in message


def drop(*names: str) -> Any:
    def change(checkpoint: dict[str, Any]) -> None:
        for name in names[:-1]:
            checkpoint = checkpoint[name]
        checkpoint.pop(names[-1])

    return change


def put(value: Any, *names: str) -> Any:
    def change(checkpoint: dict[str, Any]) -> None:
        for name in names[:-1]:
            checkpoint = checkpoint[name]
        checkpoint[names[-1]] = value

    return change


CHANGES = {
    "no state": drop("state_dict"),
    "state of another type": put([1], "state_dict"),
    "a number as a tensor": put(5, "state_dict", "network.updates"),
    "no settings": drop("hyper_parameters"),
    "no class": drop("hyper_parameters", "_class_path"),
    "another class": put(5, "hyper_parameters", "_class_path"),
    "no base model": drop("base_model"),
    "no fingerprint": drop("base_model", "fingerprint"),
    "plan of another type": put("plan", "plan"),
    "no modules": drop("plan", "modules"),
    "modules of another type": put(5, "plan", "modules"),
    "an unknown entry": put(5, "plan", "more"),
    "a rank that is no number": put("four", "plan", "rank"),
}


@BOTH
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_checkpoints_of_other_content_are_refused(change, how, work, tmp_path):
    checkpoint = torch.load(work / "fit.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", work, how)


def test_no_code_of_a_checkpoint_runs(work, tmp_path):
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"state_dict": Evil()}, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", work, "checkpoint")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, COUNT), marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_mutated_checkpoints_are_refused_or_loaded_whole(seeds, work, tmp_path):
    whole = (work / "fit.ckpt").read_bytes()
    saved = torch.load(work / "fit.ckpt", weights_only=True)["state_dict"]
    for seed in seeds:
        path = tmp_path / f"{seed}.ckpt"
        path.write_bytes(mutated_bytes(whole, random.Random(seed)))
        try:
            found = loaded(path, work, "checkpoint" if seed % 2 else "ckpt_path")
            assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
        except Exception as error:
            named = isinstance(error, CheckpointError) and str(path) in str(error)
            if not named:
                raise AssertionError(f"seed {seed}") from error
        path.unlink()
