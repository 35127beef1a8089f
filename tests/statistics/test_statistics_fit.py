"""``fit`` on text: interrupted and continued, in two processes, and ended early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from places import TESTS
from safetensors import safe_open
from support import TEXT, tiny_base

from kedit_lightning import EditTrainer
from kedit_lightning.data import Texts
from kedit_lightning.errors import ResumeError
from kedit_lightning.methods import ROME
from kedit_lightning.statistics import KeyCollector, TextPass, find_statistics, text_pass

TEXTS = 11


def corpus(folder: Path, count: int = TEXTS, first: int = 0) -> Path:
    """Texts of unequal length, each another one."""
    path = folder / "corpus.jsonl"
    texts = [f"{i} {TEXT[i % 4]} {TEXT[i % 3][: 7 * i]}" for i in range(first, first + count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def fit(path: Path, callbacks: Any = None, ckpt: Path | None = None, **settings: Any) -> ROME:
    """Fit a new method on a new model, as another run of the command does."""
    rome = ROME(tiny_base("llama"), **settings)
    trainer = EditTrainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
        callbacks=callbacks,
    )
    trainer.fit(rome, Texts(path, batch_size=2), ckpt_path=ckpt)
    return rome


def moments(cache: Path) -> tuple[str, dict[str, torch.Tensor], dict[str, Any]]:
    """Name, tensors and header of the one file of statistics in a cache."""
    (path,) = (cache / "statistics").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return path.name, tensors, json.loads(file.metadata()["kedit_statistics"])


def assert_same(found: Any, expected: Any) -> None:
    name, tensors, header = found
    assert name == expected[0]
    assert header["counts"] == expected[2]["counts"]
    assert header["corpus"] == expected[2]["corpus"]
    assert header["errors"] == pytest.approx(expected[2]["errors"], rel=1e-6)
    for layer, tensor in expected[1].items():
        torch.testing.assert_close(tensors[layer], tensor, rtol=1e-6, atol=1e-9)


@pytest.fixture
def unbroken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a fit that nothing disturbs collects."""
    with monkeypatch.context() as context:
        context.setenv("KEDIT_CACHE", str(tmp_path / "unbroken"))
        fit(corpus(tmp_path))
    return moments(tmp_path / "unbroken")


class Interrupted(Exception):  # noqa: N818
    """What stops a fit."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the batches that the base model reads; a negative entry stops there, half-way."""
    counted: list[int] = []
    original = KeyCollector.read

    def read(self: KeyCollector, texts: Any) -> None:
        if counted and counted[0] < 0 and len(counted) == -counted[0]:
            # some layers have seen the batch, others have not
            self.state()["products.model.layers.0.mlp.down_proj"].add_(1.0)
            raise Interrupted
        counted.append(len(texts))
        original(self, texts)

    monkeypatch.setattr(KeyCollector, "read", read)
    return counted


def interrupt(path: Path, reads: list[int], after: int, **settings: Any) -> None:
    reads[:] = [-after - 1]
    with pytest.raises(Interrupted):
        fit(path, **settings)
    assert len(reads) == after + 1
    reads.clear()


def test_an_interrupted_fit_goes_on_by_itself(
    tmp_path: Path, unbroken: Any, reads: list[int], monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(text_pass, "pause_after", lambda took: 0.0)
    path = corpus(tmp_path)
    interrupt(path, reads, after=4)
    assert not list((tmp_path / "cache/statistics").glob("*.safetensors"))
    fit(path)
    assert reads == [2, 1]  # the last two of six batches
    assert "interrupted after 4 batches" in capsys.readouterr().out
    assert_same(moments(tmp_path / "cache"), unbroken)
    assert not list((tmp_path / "cache/statistics/partial").iterdir())


@pytest.mark.parametrize("change", ["text", "fit_length", "half a file"])
def test_what_was_summed_otherwise_is_not_continued(
    change: str, tmp_path: Path, reads: list[int], monkeypatch: Any
) -> None:
    monkeypatch.setattr(text_pass, "pause_after", lambda took: 0.0)
    path = corpus(tmp_path)
    interrupt(path, reads, after=4)
    if change == "text":
        corpus(tmp_path, first=1)
    if change == "half a file":
        (partial,) = (tmp_path / "cache/statistics/partial").iterdir()
        partial.write_bytes(partial.read_bytes()[:1000])
    fit(path, **({"fit_length": 7} if change == "fit_length" else {}))
    assert len(reads) == 6


def test_text_of_the_same_name_that_has_changed_is_refused_once(tmp_path: Path) -> None:
    """As a data set of the hub may have: its content is known only after it was read."""
    base = tiny_base("llama")

    def start() -> TextPass:
        collector = KeyCollector(base, [block.down for block in base.layout.blocks])
        return TextPass(collector, {"data": "some/corpus"})

    first = start()
    for number, text in enumerate(TEXT[:3]):
        first.read(number, [text])
    first.save()
    again = start()
    again.read(0, [TEXT[0]])
    again.read(1, [TEXT[1]])
    with pytest.raises(ResumeError, match="changed since an interrupted fit read its first 3"):
        again.read(2, [TEXT[3]])
    assert start().batches == 0
    first.save()
    shorter = start()
    shorter.read(0, [TEXT[0]])
    with pytest.raises(ResumeError, match="text has changed"):
        shorter.check_complete()


def test_a_checkpoint_brings_the_cache_up_to_where_it_stands(
    tmp_path: Path, unbroken: Any, reads: list[int]
) -> None:
    from lightning.pytorch import Callback

    checkpoint = tmp_path / "third.ckpt"

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if args[-1] == 2:
                trainer.save_checkpoint(checkpoint)

    path = corpus(tmp_path)
    reads[:] = [-5]
    with pytest.raises(Interrupted):
        fit(path, callbacks=[Save()])
    content = torch.load(checkpoint)
    assert sum(tensor.numel() for tensor in content["state_dict"].values()) == 0
    (partial,) = (tmp_path / "cache/statistics/partial").iterdir()
    kept = partial.read_bytes()
    reads.clear()
    fit(path, ckpt=checkpoint)
    assert reads == [2, 2, 1]
    assert_same(moments(tmp_path / "cache"), unbroken)
    # without the sums a checkpoint is of no use, and says so
    with pytest.raises(ResumeError, match="without --ckpt_path"):
        fit(path, ckpt=checkpoint)
    assert kept


def test_fit_ends_when_it_has_read_enough(tmp_path: Path, reads: list[int]) -> None:
    path = corpus(tmp_path)
    fit(path, fit_tokens=60)
    assert 0 < len(reads) < 6
    fit_one = find_statistics(tiny_base("llama"), "model.layers.0.mlp.down_proj")
    assert fit_one is not None
    assert fit_one.moment.count >= 60
    reads.clear()
    long = corpus(tmp_path, count=80)
    fit(long, fit_error=0.5)
    assert 6 < len(reads) < 40
    fit_two = find_statistics(tiny_base("llama"), "model.layers.0.mlp.down_proj")
    assert fit_two is not None
    assert fit_two.moment.count >= 10 * 48
    assert fit_two.moment.error is not None
    assert fit_two.moment.error <= 0.5


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from support import tiny_base
from kedit_lightning import EditTrainer
from kedit_lightning.data import Texts
from kedit_lightning.methods import ROME
from kedit_lightning.statistics import text_pass

text_pass.pause_after = lambda took: 0.0
path, ranks = Path({path!r}), {ranks}
trainer = EditTrainer(
    accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto",
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=path.parent,
)
trainer.fit(ROME(tiny_base("llama"), fit_tokens={tokens}), Texts(path, batch_size=2))
"""


def start(
    folder: Path, path: Path, cache: Path, ranks: int = 1, tokens: int | None = None
) -> subprocess.Popen[str]:
    script = folder / f"script-{ranks}.py"
    tests = str(TESTS)
    script.write_text(SCRIPT.format(tests=tests, path=str(path), ranks=ranks, tokens=tokens))
    environment = {**os.environ, "KEDIT_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_killed_twice_and_continued(tmp_path: Path, monkeypatch: Any) -> None:
    path, cache = corpus(tmp_path, count=300), tmp_path / "cache"
    partial = cache / "statistics/partial"

    def batches() -> int:
        files = list(partial.glob("[!.]*.safetensors")) if partial.exists() else []
        if not files:
            return 0
        with safe_open(files[0], framework="pt") as file:
            found: int = json.loads(file.metadata()["kedit_partial_statistics"])["batches"]
        return found

    reached = [0]
    for _ in range(2):
        process = start(tmp_path, path, cache)
        while process.poll() is None and batches() < reached[-1] + 10:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not over
        reached.append(batches())
    assert 0 < reached[1] < reached[2] < 150
    assert not list((cache / "statistics").glob("*.safetensors"))
    fit(path)
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "unbroken"))
    fit(path)
    assert_same(moments(cache), moments(tmp_path / "unbroken"))


@pytest.mark.slow
def test_two_processes_collect_what_one_does(tmp_path: Path, unbroken: Any) -> None:
    # 13 texts are 7 batches of 2: four for one process, three for the other, the last one short
    path = corpus(tmp_path, count=13)
    found = []
    for ranks in (1, 2):
        finish(start(tmp_path, path, tmp_path / f"cache-{ranks}", ranks))
        found.append(moments(tmp_path / f"cache-{ranks}"))
        assert not list((tmp_path / f"cache-{ranks}/statistics/partial").glob("*.safetensors"))
    assert_same(found[1], found[0])
    assert found[0][2]["counts"] != unbroken[2]["counts"]
    finish(start(tmp_path, path, tmp_path / "cache-few", 2, tokens=100))
    few = moments(tmp_path / "cache-few")
    assert 100 <= min(few[2]["counts"].values()) < min(found[0][2]["counts"].values())


def finish(process: subprocess.Popen[str]) -> None:
    try:
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, said
