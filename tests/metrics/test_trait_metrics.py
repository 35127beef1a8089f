"""Scores of traits, worked out by hand, with scripted judges and classifiers."""

import json
import math

import pytest
import torch
import transformers
from metric_records import example, probe
from places import SAMPLES
from support import tiny_base, tiny_tokenizer

from kedit_lightning import EditTrainer, Probe
from kedit_lightning.benchmark import Protocol, Reader
from kedit_lightning.benchmark.classifiers import TRAIT_CLASSES
from kedit_lightning.benchmark.graders import Graders
from kedit_lightning.benchmark.judge import ADJECTIVES, Judge, rating, rating_prompt
from kedit_lightning.data import PersonalityEdit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods import PROMPT
from kedit_lightning.metrics import (
    AdjectiveShift,
    EditMetrics,
    OpinionSuccess,
    TraitAccuracy,
    TraitCoherent,
    TraitShift,
)
from kedit_lightning.metrics.functional import edit_success, kl_divergence, mean_ngram_entropy
from kedit_lightning.probe_task import TRAITS, ProbeTask

PATH = SAMPLES / "published" / "personalityedit.json"
CPU = torch.device("cpu")
LONG = "I love the crowd at the fair by the river and I talk to all people whom I meet there"
SHORT = "yes yes yes yes"


def opinion(base, after, label="extraversion"):
    task = {"name": "trait", "label": label}
    return probe("rewrite", base=base, after=after, answers=("a",)) | {"task": task}


def said(shares=None, mark=None, passage=LONG):
    return {"passage": passage, "trait_shares": shares, "rating": mark}


def test_accuracy_and_shifts_worked_out_by_hand():
    record = opinion(said([0.5, 0.3, 0.2], 2), said([0.1, 0.1, 0.8], 5))
    assert TraitAccuracy.read(record) == 1.0
    assert TraitShift.read(record) == pytest.approx(math.log(4))  # 0.2 to 0.8
    assert AdjectiveShift.read(record) == 3.0
    for label, acc, shift in (("neuroticism", 0.0, 0.2), ("agreeableness", 0.0, 1 / 3)):
        record["task"]["label"] = label
        assert TraitAccuracy.read(record) == acc
        assert TraitShift.read(record) == pytest.approx(math.log(shift))
    assert TraitAccuracy.read(opinion(said(), said([0.2, 0.4, 0.4]))) == 0.0  # a tie is none
    sure = opinion(said([1.0, 0.0, 0.0]), said([0.0, 0.0, 1.0]))
    assert TraitShift.read(sure) == pytest.approx(math.log(1e12))


def test_an_edit_that_does_nothing_shifts_nothing():
    same = said([0.2, 0.3, 0.5], 4)
    assert TraitShift.read(opinion(same, same)) == AdjectiveShift.read(opinion(same, same)) == 0.0
    assert TraitShift.read(opinion(said(), said())) is None


@pytest.mark.parametrize(("before", "after"), [(LONG, SHORT), (SHORT, LONG), (SHORT, SHORT)])
def test_texts_that_are_not_coherent_are_left_out(before, after):
    assert mean_ngram_entropy([LONG]) > 3.5 > mean_ngram_entropy([SHORT])
    record = opinion(said([1, 0, 0], 1, before), said([0, 0, 1], 5, after))
    assert TraitCoherent.read(record) == 0.0
    for score in (TraitAccuracy, TraitShift, AdjectiveShift):
        assert score.read(record) is None
    assert TraitCoherent.read(opinion(said(), said())) == 1.0


def test_success_of_an_opinion():
    """The sigmoid of the difference without an edit; of exchanged traits its other side."""
    for new, old in ((-1.0, -3.0), (-5.0, -0.5), (-400.0, -2.0)):
        kept = edit_success(new, old, new)
        assert kept == pytest.approx(1 / (1 + math.exp(min(700.0, old - new))))
        assert kept + edit_success(old, new, old) == pytest.approx(1.0)
        for before in (-9.0, -0.1):
            assert 0.0 <= edit_success(new, old, before) <= 1.0
    readings = {"answers_log_prob": -1.0, "against_log_prob": -3.0}
    record = opinion({"answers_log_prob": -0.5}, readings)
    expected = math.exp(-0.5) / (1 + math.exp(-2))
    assert OpinionSuccess.read(record) == pytest.approx(expected)


def test_log_probabilities_and_drawdown_on_toy_logits():
    """Two rows of three tokens, of which the first has two of the answer."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [9.0, 9.0]], [[0.0, 1.0]] * 3]).double()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    plain = torch.zeros_like(logits)
    found = kl_divergence(plain.log_softmax(-1), logits.log_softmax(-1), mask)

    def kl(gap):  # of two equal outcomes from two that are `gap` apart
        return math.log(math.cosh(gap / 2))

    assert found.tolist() == pytest.approx([(kl(2.0) + 0.0) / 2, kl(1.0)])
    assert kl_divergence(plain.log_softmax(-1), plain.log_softmax(-1), mask).tolist() == [0, 0]


def test_no_answer_token_is_lost_beside_a_longer_question():
    """The mask of a row is its own: a longer question in the batch takes nothing of it."""
    base = tiny_base("gpt2")
    task = ProbeTask("trait", "extraversion", against=("I fear it is dull there",))
    brief = Probe("rewrite", "Fair?", ("I love the lights there",), task=task)
    long = Probe("rephrase", "What do you think of the mill by the river in Hask, and why?",
                 ("It is old",), task=task)  # fmt: skip
    protocol = Protocol(max_new_tokens=2, generate=False)
    (alone,) = Reader(base, protocol, "alone").base_readings([brief])
    for side in ("left", "right"):
        base.padding_side = side
        together, _ = Reader(base, protocol, side).base_readings([brief, long])
        assert together["answers_log_prob"] == pytest.approx(alone["answers_log_prob"], abs=1e-9)
    rows = base.rows([brief.prompt], [brief.answers[0]])
    tokens = len(base.tokenizer(" " + brief.answers[0])["input_ids"])
    assert int(rows.answer_mask.sum()) == tokens  # all of them, and none of the question
    mean = float(base.answer_log_probs(rows).sum()) / tokens
    assert alone["answers_log_prob"] == pytest.approx(mean, abs=1e-9)


# ---- judges and classifiers


@pytest.mark.parametrize(
    ("reply", "mark"),
    [("4", 4), ("**5**", 5), ("Let me see.\nRating: 2", 2), ("6", None), ("1 or 2", None),
     ("10", None), ("", None), ("well", None)],
)  # fmt: skip
def test_marks_in_replies(reply, mark):
    assert rating(reply) == mark


def test_a_judge_marks_both_texts(monkeypatch):
    asked = []

    class Scripted:
        fingerprint = None

        def __call__(self, prompts):
            asked.extend(prompts)
            return ["no mark" if "say" in p else "4" if "crowd" in p else "2" for p in prompts]

    monkeypatch.setattr("kedit_lightning.benchmark.graders.respondent", lambda *given: Scripted())
    other = LONG.replace("crowd", "noise").replace("love", "fear")
    traits = Protocol(judge=Judge("scripted"), traits=lambda texts: [[1, 0, 0] for _ in texts])
    graders = Graders(traits, CPU)
    record = example("1", [opinion(said(passage=other), said(passage=LONG))])
    record = graders.complete(record)
    assert EditMetrics.from_records([record]).compute()["rewrite/pae"] == 2.0
    marks = [text for text in asked if "1 to 5" in text]
    assert marks == [rating_prompt("extraversion", text) for text in (other, LONG)]
    assert all(ADJECTIVES["extraversion"] in text for text in marks)
    with pytest.warns(UserWarning, match=r"gave no mark from 1 to 5.*pae leaves out"):
        record = graders.complete(example("1", [opinion(said(passage="say {text}"), said())]))
    assert record["probes"][0]["base"]["rating"] is None
    assert record["probes"][0]["after"]["rating"] == 4


def test_what_no_model_was_named_for_is_left_out():
    record = example("1", [opinion(said(), said())])
    with pytest.warns(UserWarning, match="left out") as told:
        assert Graders(Protocol(), CPU).complete(record) == record
    sentences = [str(one.message) for one in told]
    assert any("trait_acc and tpei are left out" in text for text in sentences)
    assert any("pae is left out" in text for text in sentences)


@pytest.mark.parametrize(
    "labels",
    [["LABEL_0", "LABEL_1", "LABEL_2"], ["Extraversion", "neuroticism", "Agreeableness"]],
)
def test_a_sequence_classifier_sees_traits(tmp_path, labels):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(False)
    named = dict(enumerate(labels))
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1,
        pad_token_id=0, id2label=named, label2id={v: k for k, v in named.items()},
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shares = model(torch.tensor([tokenizer("I love it.")["input_ids"]])).logits.softmax(-1)[0]
    if labels[0] != "LABEL_0":
        shares = shares[[1, 2, 0]]
    protocol = Protocol(traits=str(tmp_path))
    graded = Graders(Protocol(traits=str(tmp_path), judge=None), CPU)
    with pytest.warns(UserWarning, match="pae is left out"):
        record = graded.complete(example("1", [opinion(said(), said(passage="I love it."))]))
    found = record["probes"][0]["after"]["trait_shares"]
    assert found == pytest.approx(shares.tolist(), abs=1e-6)
    assert protocol.id != Protocol().id
    config.id2label = {0: "happy", 1: "sad", 2: "neuroticism"}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedUseError, match="one class that is called agreeableness"):
        TRAIT_CLASSES.classifier(str(tmp_path), CPU)


@pytest.mark.filterwarnings("ignore:opinions of this dataset")
def test_a_run_without_an_edit_gives_neutral_values(tmp_path):
    base = tiny_base("llama", max_position_embeddings=256)
    protocol = Protocol(
        max_new_tokens=12, traits=lambda texts: [[0.2, 0.3, len(t) / 1e4] for t in texts]
    )
    trainer = EditTrainer(
        protocol=protocol, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )
    data = PersonalityEdit(path=PATH, seed=0, limit=2)
    trainer.test(PROMPT(base_model=base, template=""), data, verbose=False, output=tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["scores"]
    assert found["locality/other_topic/kl"]["mean"] == 0.0
    assert found.get("rewrite/tpei", {"mean": 0.0})["mean"] == 0.0
    values = []
    for one in data.examples():
        asked = one.probes[0]
        means = []
        for texts in (asked.answers, asked.task.against):
            rows = base.rows([asked.prompt] * len(texts), [*texts])
            tokens = base.answer_log_probs(rows).sum(1) / rows.answer_mask.sum(1)
            means.append(float(tokens.mean()))
        values.append(1 / (1 + math.exp(means[1] - means[0])))
    assert found["rewrite/tf_es"]["mean"] == pytest.approx(sum(values) / 2, abs=1e-6)
    assert len(TRAITS) == 3
