"""A stream that ruins the model is told of, stopped, or taken back to its last healthy point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_base
from toys import Toy

from kedit_lightning import BaseModel, EditRequest, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.benchmark.health import Bounds, Health, HealthMonitor
from kedit_lightning.callbacks import CanaryGuard
from kedit_lightning.cli.config_arguments import with_canary
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.data import NanoFacts, Requests
from kedit_lightning.errors import FactsNotWrittenError, StreamStopped, UnsupportedUseError
from kedit_lightning.methods import ROME
from kedit_lightning.runs import Ledger

TEXT = [
    "The kettle sang and someone knocked",
    "Most bread needs only flour, water, salt",
    "A ladder stands steep and may tip backwards in the wind",
]
CITIES = ("Lyon", "Paris", "Berlin", "Warsaw", "Norway", "Rome")
STREAM = Protocol(mode="sequential", generate=False)


class Rotting(Toy):
    """Its fourth edit is far too strong, which is what ruins a model."""

    def compute_edit(self, requests: Any) -> Any:
        edit = super().compute_edit(requests)
        if "Warsaw" in requests[0].prompt:
            for delta in edit.factors.values():
                delta.b.mul_(50)
        return edit


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TEXT))
    return path


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.json"
    named = [{"prompt": f"The tower of {city} is in", "target_new": "Rome", "id": city}
             for city in CITIES]  # fmt: skip
    path.write_text(json.dumps(named))
    return path


def guard(text: Path, action: Any, **settings: Any) -> CanaryGuard:
    return CanaryGuard(action, text=text, **{"perplexity": 1.05, "facts": None, **settings})


def edited(facts: Path, canary: CanaryGuard, base: BaseModel, **where: Any) -> EditTrainer:
    trainer = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[canary])
    trainer.edit(Rotting(base_model=base, strength=2.0), Requests(facts), **where)
    return trainer


@pytest.mark.parametrize(("action", "kept"), [("rollback", 3), ("stop", 4), ("warn", 6)])
def test_the_run_ends_where_the_action_says(
    action: str, kept: int, facts: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    base, canary = tiny_base("llama"), guard(text, action)
    if action == "warn":
        with pytest.warns(UserWarning, match=r"canary: under edit 'chunk-00003' perplexity is"):
            edited(facts, canary, base, output=tmp_path / "run")
    else:
        edited(facts, canary, base, output=tmp_path / "run")
    stack = json.loads((tmp_path / "run/stack.json").read_text())["edits"]
    assert [entry["requests"] for entry in stack] == [[city] for city in CITIES[:kept]]
    said = " ".join(capsys.readouterr().out.split())
    assert ("stopped by the canary: under edit 'chunk-00003'" in said) == (action != "warn")
    assert "of 6 facts hold" in said
    for city in CITIES[kept:]:
        assert f"'The tower of {city} is in' -> 'Rome'" in said
    lines = [json.loads(x) for x in (tmp_path / "run/canary.jsonl").read_text().splitlines()]
    assert [line["edit"] for line in lines] == [f"chunk-{n:05d}" for n in range(len(lines))]
    assert [bool(line["broken"]) for line in lines[:4]] == [False, False, False, True]
    assert len(lines) == (6 if action == "warn" else 4)
    assert not base.edits.ids


def test_what_stands_after_a_rollback_is_the_healthy_model(facts: Path, text: Path) -> None:
    base, canary = tiny_base("llama"), guard(text, "rollback")
    trainer = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[canary])
    edits = trainer.edit(Rotting(base_model=base, strength=2.0), Requests(facts))
    monitor = HealthMonitor(base, TEXT, Bounds(1.05, facts=None))
    for edit in edits:
        edit.apply()
    assert len(edits) == 3
    assert not monitor.read().broken(monitor.bounds)
    assert monitor.read().perplexity == pytest.approx(canary.checks[2]["perplexity"])
    base.edits.clear()
    with pytest.raises(FactsNotWrittenError, match="of 6 facts hold"):
        trainer.edit(Rotting(base_model=base, strength=2.0), Requests(facts), strict=True)


def test_a_ledger_and_a_test_are_guarded_too(facts: Path, text: Path, tmp_path: Path) -> None:
    base = tiny_base("llama")
    edited(facts, guard(text, "rollback"), base, ledger=tmp_path / "ledger")
    assert len(Ledger(tmp_path / "ledger").standing) == 3
    trainer = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[guard(text, "rollback")])
    data, method = Requests(facts), Rotting(base_model=base, strength=2.0)
    trainer.test(method, data, output=tmp_path / "run", verbose=False)
    ids = [json.loads(x)["id"] for x in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert set(ids) == set(CITIES[:3])


def test_one_batch_is_refused_as_a_whole(facts: Path, text: Path, tmp_path: Path) -> None:
    base = tiny_base("llama")
    canary = guard(text, "rollback")
    batch = Protocol(mode="batch", chunk_size=6, generate=False)
    trainer = EditTrainer(accelerator="cpu", protocol=batch, callbacks=[canary])
    with pytest.raises(StreamStopped, match=r"under edit 'chunk-00000'.*rolled back"):
        trainer.edit(Toy(base_model=base, strength=30.0), Requests(facts), output=tmp_path / "run")
    assert not base.edits.ids
    assert not list((tmp_path / "run/edits").glob("*.safetensors"))
    first = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[guard(text, "rollback")])
    with pytest.raises(StreamStopped):
        first.edit(Toy(base_model=base, strength=30.0), Requests(facts))


def test_a_resumed_run_goes_on_with_what_was_found(facts: Path, text: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    edited(facts, guard(text, "rollback"), tiny_base("llama"), output=whole)
    canary = guard(text, "rollback")
    trainer = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[canary])
    write, seen = canary._write, []

    def interrupted(method: Any, check: dict[str, Any]) -> None:
        write(method, check)
        seen.append(check)
        if len(seen) == 3:
            raise KeyboardInterrupt

    canary._write = interrupted  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer.edit(
            Rotting(base_model=tiny_base("llama"), strength=2.0), Requests(facts), output=broken
        )
    edited(facts, guard(text, "rollback"), tiny_base("llama"), resume=broken)
    for name in ("canary.jsonl", "stack.json"):
        assert (broken / name).read_text() == (whole / name).read_text()


def test_a_resumed_run_ends_with_the_edit_that_it_had_ended_with(
    facts: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    edited(facts, guard(text, "stop"), tiny_base("llama"), output=tmp_path / "run")
    before = [(tmp_path / "run" / name).read_text() for name in ("canary.jsonl", "stack.json")]
    capsys.readouterr()
    edited(facts, guard(text, "stop"), tiny_base("llama"), resume=tmp_path / "run")
    after = [(tmp_path / "run" / name).read_text() for name in ("canary.jsonl", "stack.json")]
    assert after == before
    said = " ".join(capsys.readouterr().out.split())
    assert "stopped by the canary: under edit 'chunk-00003'" in said


def test_a_ledger_that_ended_with_an_edit_gets_no_other(
    facts: Path, text: Path, tmp_path: Path, capsys: Any
) -> None:
    base = tiny_base("llama")
    for _ in range(2):
        edited(facts, guard(text, "stop"), base, ledger=tmp_path / "ledger")
        assert len(Ledger(tmp_path / "ledger").standing) == 4
    last = list(Ledger(tmp_path / "ledger").standing.values())[-1]
    said = " ".join(capsys.readouterr().out.split())
    assert f"stopped by the canary: under edit '{last.id}' perplexity is" in said


# ---- what is read


def test_norms_and_old_facts_are_those_of_the_stack() -> None:
    base = tiny_base("llama")
    method = Toy(base_model=base, strength=5.0)
    requests = [EditRequest(f"The tower of {city} is in", "Rome") for city in CITIES]
    monitor = HealthMonitor(base, TEXT, Bounds(norm=9.0), sample=5)
    assert monitor.read() == Health(pytest.approx(1.0), pytest.approx(0.0), 1.0, None)
    for request in requests[:-1]:
        method.edit([request]).apply()
    last = method.edit(requests[-1:])
    health = monitor.read(last)
    with last:
        (name,) = last.deltas()
        change = sum(edit.deltas()[name] for edit in base.edits)
        weight = base.model.get_parameter(name)
        norm = float((weight + change).norm() / weight.norm())
        answers = base.generate([r.prompt for r in requests[:-1]], max_new_tokens=1)
    assert health.norm == pytest.approx(norm)
    noted = [edit.origin.notes["target_probabilities"][0] for edit in base.edits]
    written = [i for i, p in enumerate(noted) if p >= 0.5]
    if len(written) >= 4:
        held = sum(answers[i].strip().startswith("Rome") for i in written) / len(written)
        assert health.facts == pytest.approx(held)
    taken = list(base.edits)[-1]
    taken.rollback()
    assert monitor.read().norm != pytest.approx(norm)  # what was taken off counts no more
    base.edits.clear()


def test_overwritten_facts_are_not_asked_and_the_sample_follows_from_the_seed() -> None:
    base = tiny_base("llama")
    method = Toy(base_model=base, strength=60.0)
    for city in CITIES:
        method.edit([EditRequest(f"The tower of {city} is in", "Rome")]).apply()
    for edit in base.edits:
        edit.note(target_probabilities=[0.9])

    def asked(seed: int, sample: int = 4) -> list[str]:
        monitor = HealthMonitor(base, TEXT, sample=sample, seed=seed)
        monitor.read(method.edit([EditRequest("The tower of Paris is in", "Lyon")]))
        return [request.prompt.split()[3] for request in monitor._asked]

    assert sorted(asked(0, 6)) == sorted(set(CITIES) - {"Paris"})
    assert len(asked(0)) in (3, 4)
    assert asked(0) == asked(0)
    assert any(asked(seed) != asked(0) for seed in range(1, 5))
    base.edits.clear()


def test_a_value_that_is_not_finite_is_out_of_bounds() -> None:
    for place in range(3):
        values = [1.0, 0.0, 1.0]
        values[place] = float("nan")
        assert Health(*values, None).broken(Bounds(None, None, None, None))
    assert Health(1.0, 0.0, 1.0, 0.4).broken(Bounds()) == ["40% of the old facts hold (bound 50%)"]
    assert not Health(1.4, 9.0, 9.0, 0.5).broken(Bounds())
    assert len(Health(1.6, 9.0, 9.0, 0.1).broken(Bounds(1.5, 1.0, 2.0, 0.5))) == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"perplexity": 1.0}, "above 1"), ({"norm": 0.5}, "above 1"), ({"kl": 0.0}, "above 0"),
     ({"facts": 2.0}, "share")],
)  # fmt: skip
def test_bounds_that_mean_nothing_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UnsupportedUseError, match=words):
        CanaryGuard("warn", **settings)  # type: ignore[arg-type]


def test_it_guards_edits_that_stay_only(facts: Path, text: Path) -> None:
    trainer = EditTrainer(accelerator="cpu", callbacks=[guard(text, "warn")])
    with pytest.raises(UnsupportedUseError, match="edits that stay"):
        trainer.test(Toy(base_model=tiny_base("llama")), Requests(facts))


def test_the_command_takes_an_action() -> None:
    with pytest.raises(UsageError, match="warn, stop and rollback"):
        with_canary(["edit", "--canary", "never"])
    assert with_canary(["edit", "--canary=stop"])[2] == "--trainer.callbacks.action=stop"


@pytest.mark.slow
def test_rome_is_stopped_on_nano_before_it_ruins_it(tmp_path: Path) -> None:
    """ROME loses what nano knows fact by fact; the canary ends it at the last healthy point."""
    base = BaseModel.load("nano")
    known = [f"{probe.prompt} {probe.answers[0]}"
             for example in NanoFacts(limit=200, seed=1).examples("validation")
             for probe in example.probes if probe.kind == "locality" and probe.answers]  # fmt: skip
    text = tmp_path / "known.txt"
    sentences = [line for line in dict.fromkeys(known) if len(line.split()) > 3]
    text.write_text("\n".join(sentences[:64]))
    canary = CanaryGuard("rollback", text=text, passages=64, perplexity=1.1)
    trainer = EditTrainer(accelerator="cpu", protocol=STREAM, callbacks=[canary])
    edits = trainer.edit(ROME(base_model=base, layer=4), NanoFacts(limit=60))
    assert 5 < len(edits) < 40
    assert canary.checks[-1]["broken"]
    assert canary.checks[-1]["perplexity"] > 1.1
    assert all(check["perplexity"] <= 1.1 for check in canary.checks[:-1])
    assert len(canary.checks) == len(edits) + 1
