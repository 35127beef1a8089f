"""What a stream does to the model as a whole, against the same numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import assert_equal, content
from support import REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.canary import Canary, WeightGrowth, halves
from kedit_lightning.callbacks import StreamDrift
from kedit_lightning.data import Requests
from kedit_lightning.data.plain_text import passages_of
from kedit_lightning.edits.materialisation import materialise
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, ResumeError
from kedit_lightning.methods import PROMPT
from kedit_lightning.metrics import ExampleRecord

TEXT = [
    "The kettle sang and someone knocked",
    "Most bread needs only flour, water, salt",
    "A ladder stands steep and may tip backwards in the wind",
]
STREAM = Protocol(mode="sequential", every="log", max_new_tokens=4)


def by_hand(base: BaseModel, model: Any) -> tuple[float, float]:
    """Perplexity of the second halves under a model, and its divergence from the base model."""
    lost, tokens, divergences = 0.0, 0, []
    for passage in TEXT:
        row = base.encode(*halves(base, passage))
        ids = torch.tensor([[*row.prompt, *row.answer]])
        places = slice(len(row.prompt) - 1, -1)
        logs, plain = (m(ids).logits[0, places].log_softmax(-1) for m in (model, base.model))
        lost -= logs[range(len(row.answer)), list(row.answer)].sum().item()
        tokens += len(row.answer)
        divergences.append((plain.exp() * (plain - logs)).sum(-1).mean().item())
    return torch.tensor(lost / tokens).exp().item(), sum(divergences) / len(divergences)


@torch.no_grad()
def test_canary_and_growth_equal_those_of_a_model_with_written_weights() -> None:
    base = tiny_base("gpt2")
    canary, growth = Canary(base, TEXT, 2), WeightGrowth(base)
    assert canary.base_perplexity() == pytest.approx(by_hand(base, base.model)[0], rel=1e-6)
    assert canary.measure()["kl"] == 0.0
    method = Toy(base_model=base, strength=3.0)
    edits = []
    for request in REQUESTS[:2]:
        edits.append(method.edit([request]))
        edits[-1].apply()
    written = materialise(base, edits)
    found, weights = canary.measure(), growth.measure(edits)
    for turned in (Canary(base, TEXT[::-1], 32), Canary(base, TEXT, 1)):
        assert turned.measure() == pytest.approx(found, rel=1e-9)
    for edit in reversed(edits):
        edit.rollback()
    perplexity, kl = by_hand(base, written)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert found["kl"] == pytest.approx(kl, rel=1e-6)
    (name,) = weights
    before, after = base.model.get_parameter(name), written.get_parameter(name)
    assert weights[name]["change"] == pytest.approx(
        ((after - before).norm() / before.norm()).item()
    )
    assert weights[name]["norm"] == pytest.approx((after.norm() / before.norm()).item())
    assert growth.measure(edits) == weights  # each edit counts once


def test_edits_of_prompts_move_no_weight_and_act_on_the_canary() -> None:
    base = tiny_base("llama")
    canary, edit = Canary(base, TEXT), PROMPT(base_model=base).edit(REQUESTS[:1])
    with edit:
        assert WeightGrowth(base).measure([edit]) == {}
        assert canary.measure()["kl"] > 0


def test_passages_are_those_of_the_package_or_of_a_file(tmp_path: Path) -> None:
    assert len(set(passages_of())) == 64
    assert passages_of(seed=1) == passages_of()
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"passage number {n} of this file" for n in range(100)) + "\ntoo few")
    one, other = passages_of(file), passages_of(file, seed=1)
    assert len(one) == 64
    assert one == sorted(one, key=lambda text: int(text.split()[2]))
    assert one == passages_of(file)
    assert one != other
    file.write_text("too few\n")
    with pytest.raises(DataFileError, match="at least four words"):
        passages_of(file)
    with pytest.raises(DataFileNotFoundError, match="packaged"):
        passages_of(tmp_path / "absent")


def test_long_passages_are_shortened_to_the_window() -> None:
    base = tiny_base("gpt2")
    prompt, rest = halves(base, " ".join(["word"] * 80))
    assert base.encoder.count_prompt(prompt) + base.encoder.count(rest) <= base.max_tokens
    assert halves(base, "a b c d") == ("a b", "c d")


# ---- the callback


def facts(folder: Path) -> Path:
    """A file of five facts."""
    named = [{"prompt": f"The tower of {city} is in", "target_new": "Rome", "id": city}
             for city in ("Lyon", "Paris", "Berlin", "Warsaw", "Norway")]  # fmt: skip
    path = folder / "facts.json"
    path.write_text(json.dumps(named))
    return path


def run(folder: Path, text: Path, resume: bool = False, stop: int | None = None) -> StreamDrift:
    drift = StreamDrift(text)
    trainer = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[drift])
    written: list[ExampleRecord] = []

    def breaking(record: ExampleRecord, *others: Any) -> None:
        written.append(record)
        if len(written) == stop:
            raise KeyboardInterrupt

    if stop is not None:
        take = trainer._take_record
        trainer._take_record = lambda *told: (take(*told), breaking(*told))[0]  # type: ignore
    where = {"resume" if resume else "output": folder}
    method = Toy(base_model=tiny_base("llama"), noise=0.01, strength=3.0)
    trainer.test(method, Requests(facts(folder.parent)), verbose=False, **where)
    return drift


def test_a_resumed_stream_has_the_drift_of_an_unbroken_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT))
    whole = run(tmp_path / "whole", text)
    assert [entry["facts"] for entry in whole.checkpoints] == [0, 1, 2, 5]
    moved = [max((w["change"] for w in e["weights"].values()), default=0.0)
             for e in whole.checkpoints]  # fmt: skip
    assert moved == sorted(moved)
    assert "the model on plain text" in capsys.readouterr().out
    expected = json.loads((tmp_path / "whole/drift.json").read_text())
    retention = json.loads((tmp_path / "whole/results.json").read_text())["retention"]
    assert retention["checkpoints"] == [1, 2, 5]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "run", text, stop=4)
    assert len(json.loads((tmp_path / "run/drift.json").read_text())["checkpoints"]) < 4
    run(tmp_path / "run", text, resume=True)
    assert json.loads((tmp_path / "run/drift.json").read_text()) == expected
    assert_equal(content(tmp_path / "run"), content(tmp_path / "whole"))
    text.write_text("These are other words now")
    with pytest.raises(ResumeError, match="other passages"):
        run(tmp_path / "run", text, resume=True)


def test_it_follows_streams_only(tmp_path: Path) -> None:
    trainer = EditTrainer(accelerator="cpu", callbacks=[StreamDrift()])
    with pytest.raises(ValueError, match="mode sequential"):
        trainer.test(Toy(base_model=tiny_base("llama")), datamodule=Requests(facts(tmp_path)))
