"""General ability: requests of the harness against slow references, and what may be claimed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from places import SAMPLES
from support import REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import EditRequest, EditTrainer
from kedit_lightning.analysis.ability import (
    DocumentScores,
    ability_scores,
    changes,
    documents_needed,
)
from kedit_lightning.analysis.harness import RequestAnswers
from kedit_lightning.benchmark import Protocol
from kedit_lightning.callbacks import AbilityCheck
from kedit_lightning.cli.config_arguments import with_ability
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.data import Requests
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.errors import (
    DataFileError,
    DataFileNotFoundError,
    MissingExtraError,
    UnsupportedUseError,
)
from kedit_lightning.methods import PROMPT
from kedit_lightning.runs.saved_stack import apply_saved, load_stack

PAIRS = [
    ("Amber Falls lies in", " Norway"),
    ("What country is Lyon in? It is in ", "France"),  # the space goes to the answer
    ("The company Bolt was founded in Berlin by", " Anna Weiss."),
    ("Answer:", "A"),
    ("", "Rome is the capital of Italy."),
]
TWO = [EditRequest("Italy has its capital in", "Warsaw"), REQUESTS[0]]
TASK = SAMPLES / "ability" / "capitals.yaml"


def values(answers: RequestAnswers, pairs: list[tuple[str, str]]) -> list[float]:
    return [value for value, _ in answers.log_likelihoods(pairs)]


def test_demonstrations_make_way_for_a_context_as_whole_texts() -> None:
    base = tiny_base("llama", max_position_embeddings=128)
    shown = tuple(f"New Fact: Number {n} is red\n" for n in range(20))
    entry = PromptEntry("Ada died in", "", shown, "New Fact: Ada died in Rome\n")
    with PromptEdit(base, [entry]):
        row = RequestAnswers(base)._row("Ada died in", " Rome")
    assert 100 < len(row.prompt) + len(row.answer) <= 128
    text = base.tokenizer.decode(row.prompt, skip_special_tokens=True)
    assert text.startswith("New Fact: Number")
    assert text.endswith("New Fact: Ada died in Rome\nAda died in")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_log_likelihoods_equal_a_slow_pass_whatever_the_batch(kind: str) -> None:
    base = tiny_base(kind)
    encode = base.encoder.encode
    found = RequestAnswers(base, 3).log_likelihoods(PAIRS)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        whole = (context + continuation).strip()
        start = encode(context.strip()).prompt if context else base.encoder.prefix
        start = start or (base.tokenizer.eos_token_id,)
        ids = encode(whole).prompt if context else (*start, *encode(whole).prompt[-len(
            base.tokenizer(whole, add_special_tokens=False)["input_ids"]):])  # fmt: skip
        logits = base.model(torch.tensor([ids])).logits[0, len(start) - 1 : -1]
        answer = torch.tensor(ids[len(start) :])
        logs = logits.log_softmax(-1).gather(-1, answer[:, None])
        assert value == pytest.approx(logs.sum().item(), abs=1e-8)
        assert greedy == bool((logits.argmax(-1) == answer).all())
    sums = [value for value, _ in found]
    assert values(RequestAnswers(base, 1), PAIRS[::-1])[::-1] == pytest.approx(sums)
    base.padding_side = "left"
    assert values(RequestAnswers(base, 5), PAIRS) == pytest.approx(sums)


@torch.no_grad()
def test_rolling_predicts_each_token_once_and_generation_ends_where_it_is_told() -> None:
    base = tiny_base("llama")
    answers = RequestAnswers(base, 2)
    text = "Rome is the capital of Italy."
    ids = base.encoder.encode(text).prompt
    logs = base.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    whole = logs.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()
    assert answers.rolling([text, text]) == pytest.approx([whole] * 2)
    long = " ".join([text] * 30)
    windows = list(answers._windows(long))
    tokens = base.tokenizer(long, add_special_tokens=False)["input_ids"]
    assert [id for row in windows for id in row.answer] == tokens
    assert all(len(row.prompt) + len(row.answer) <= base.max_tokens for row in windows)
    assert len(windows[-1].prompt) + len(windows[-1].answer) == base.max_tokens
    (free,) = base.generate(["Rome is"], 8)
    end = free[2]
    asked = [("Rome is", {"max_gen_toks": 8}), ("Rome is", {"until": [end], "max_gen_toks": 8})]
    assert answers.generated(asked) == [free, free[: free.index(end)]]
    assert len(answers.generated([(long, {"until": end})])) == 1  # cut from the left
    with pytest.raises(UnsupportedUseError, match="do_sample"):
        answers.generated([("Rome is", {"do_sample": True})])


def test_edits_of_weights_and_of_prompts_act() -> None:
    base = tiny_base("llama")
    plain = RequestAnswers(base).log_likelihoods(PAIRS[:1])
    for edit in (
        Toy(base_model=base).edit(REQUESTS[3:]),
        PROMPT(base_model=base).edit(REQUESTS[3:]),
    ):
        with edit:
            assert RequestAnswers(base).log_likelihoods(PAIRS[:1]) != plain
    assert RequestAnswers(base).log_likelihoods(PAIRS[:1]) == plain


# ---- claims


def scores(*values: float, task: str = "t", metric: str = "acc") -> DocumentScores:
    return {(task, metric): {str(n): value for n, value in enumerate(values)}}


def test_a_loss_beyond_the_margin_is_ruled_out_or_not() -> None:
    held = [1.0] * 500 + [0.0] * 500
    (same,) = changes(scores(*held), scores(*held), margin=0.01)
    assert (same.documents, same.before, same.after, same.p) == (1000, 0.5, 0.5, 1.0)
    assert -0.01 < same.low < 0  # no document differs, yet nothing is certain
    assert same.not_inferior
    (worse,) = changes(scores(*held), scores(*[0.0] * 50, *held[50:]), margin=0.01)
    assert worse.after == pytest.approx(0.45)
    assert worse.p == pytest.approx(2 * 0.5**50)
    # The bound is that of the normal distribution, about.
    sd = math.sqrt(0.05 * 0.95)
    assert worse.low == pytest.approx(-0.05 - 1.645 * sd / math.sqrt(1000), abs=0.002)
    assert not worse.not_inferior
    assert changes(scores(*held), scores(*[0.0] * 50, *held[50:]), margin=0.08)[0].not_inferior
    (few,) = changes(scores(1.0, 0.0), scores(1.0, 0.0), margin=0.01)
    assert not few.not_inferior
    assert few.needed == documents_needed(0.0, 0.01) == 268


@pytest.mark.slow
def test_the_documents_needed_rule_a_loss_out_four_times_of_five() -> None:
    """Of as many documents as are said to be needed, with no loss at all."""
    generator = torch.Generator().manual_seed(0)
    count, share = documents_needed(math.sqrt(0.2), 0.1), 0.2
    claimed = 0
    for _ in range(100):
        differs = torch.rand(count, generator=generator) < share
        first = torch.randint(2, (count,), generator=generator).double()
        second = torch.where(
            differs, torch.rand(count, generator=generator).round().double(), first
        )
        # Half of the redrawn ones change: the variance of differences is half of the share.
        claimed += changes(scores(*first.tolist()), scores(*second.tolist()), 0.1)[0].not_inferior
    assert claimed >= 80


def test_tasks_are_pooled_over_the_documents_of_both_times() -> None:
    before = scores(1.0, 1.0, task="a") | scores(0.0, 0.5, task="b") | scores(2.0, metric="f1")
    after = scores(1.0, 0.0, task="a") | scores(0.0, task="b")
    rows = {(row.task, row.metric): row for row in changes(before, after, 0.01)}
    assert rows.keys() == {("a", "acc"), ("b", "acc"), ("all tasks", "acc")}
    assert rows["all tasks", "acc"].documents == 3
    assert rows["all tasks", "acc"].after == pytest.approx(1 / 3)
    assert rows["b", "acc"].documents == 1


# ---- task files and the command line


def test_task_files_that_are_none(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    base, file = tiny_base("llama"), tmp_path / "own.yaml"
    with pytest.raises(DataFileNotFoundError, match="no task file"):
        ability_scores(base, [str(file)])
    file.write_text("task: own\ndoc_to_text: !function code.text\n")
    with pytest.raises(DataFileError, match="run code"):
        ability_scores(base, [str(file)])
    file.write_text("dataset_path: json\n")
    with pytest.raises(DataFileError, match="no field 'task'"):
        ability_scores(base, [str(file)])


def test_the_option_names_tasks() -> None:
    assert with_ability(["test", "--output", "run"]) == ["test", "--output", "run"]
    with pytest.raises(UsageError, match="--ability needs tasks"):
        with_ability(["test", "--ability", "--output"])


def test_ability_is_of_one_edited_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def test(protocol: Protocol, check: AbilityCheck) -> None:
        trainer = EditTrainer(accelerator="cpu", callbacks=[check], protocol=protocol)
        trainer.test(Toy(base_model=tiny_base("llama")), Requests(facts(tmp_path)))

    with pytest.raises(UnsupportedUseError, match="one edited model"):
        test(Protocol(), AbilityCheck([str(TASK)]))
    stream = Protocol(mode="sequential")
    with pytest.raises(UnsupportedUseError, match="at least one task"):
        test(stream, AbilityCheck([]))
    with pytest.raises(UnsupportedUseError, match="at least one document"):
        test(stream, AbilityCheck([str(TASK)], limit=0))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"kedit-lightning\[ability\]"):
        test(stream, AbilityCheck([str(TASK)]))


def facts(folder: Path) -> Path:
    path = folder / "facts.json"
    named = [{"prompt": r.prompt, "target_new": r.target_new, "id": str(n)}
             for n, r in enumerate(TWO)]  # fmt: skip
    path.write_text(json.dumps(named))
    return path


@pytest.mark.slow
def test_a_run_tells_ability_before_and_after(tmp_path: Path) -> None:
    """The harness is given the same answers as by a base model that is asked by hand."""
    pytest.importorskip("lm_eval")
    base = tiny_base("llama")

    def run(**where: Any) -> None:
        trainer = EditTrainer(
            accelerator="cpu",
            callbacks=[AbilityCheck([str(TASK)])],
            protocol=Protocol(mode="sequential", max_new_tokens=3),
        )
        trainer.test(Toy(base_model=base), Requests(facts(tmp_path)), verbose=False, **where)

    run(output=tmp_path / "run")
    found = json.loads((tmp_path / "run/ability.json").read_text())
    (change,) = found["changes"]
    documents = [json.loads(line) for line in TASK.with_suffix(".jsonl").read_text().splitlines()]

    def right(document: Any) -> float:
        pairs = [
            (f"{document['country']} has its capital in", f" {c}") for c in document["choices"]
        ]
        values = [value for value, _ in RequestAnswers(base).log_likelihoods(pairs)]
        return float(values.index(max(values)) == document["label"])

    assert list(found["before"][0]["scores"].values()) == [right(d) for d in documents]
    edits = sorted((tmp_path / "run/edits").iterdir())
    assert len(edits) == len(found["edits"]) == 2
    with base.edits.restored():
        apply_saved(load_stack(tmp_path / "run", base))
        assert list(found["after"][0]["scores"].values()) == [right(d) for d in documents]
    assert change["documents"] == 4
    assert change["not_inferior"] is False
    # A resumed run takes the scores that it has.
    written = (tmp_path / "run/ability.json").read_text()
    run(resume=tmp_path / "run")
    assert (tmp_path / "run/ability.json").read_text() == written
