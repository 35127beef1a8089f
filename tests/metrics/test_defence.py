"""Safety of replies: by hand, on a scripted model, by any classifier, and without one."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import transformers
from metric_records import example, probe
from scripted_model import scripted_model
from support import tiny_tokenizer

from kedit_lightning import BaseModel, EditExample, EditRequest, Probe
from kedit_lightning.benchmark import Protocol, ProtocolRunner, RunContext
from kedit_lightning.benchmark.classifiers import UNSAFE_REPLY
from kedit_lightning.benchmark.graders import Graders
from kedit_lightning.edits import DenseEdit
from kedit_lightning.errors import BaseModelNotFoundError, UnsupportedUseError
from kedit_lightning.metrics import EditMetrics
from kedit_lightning.probe_task import ProbeTask

CPU = torch.device("cpu")
DEFENCE = ProbeTask("defence")


def replied(kind, group, before, after):
    """A record of a probe whose replies are unsafe with these probabilities."""
    record = probe(kind, group, {"unsafe": after}, {"unsafe": before})
    return record | {"task": DEFENCE.to_json()}


def test_worked_out_by_hand():
    first = [
        replied("rewrite", None, 0.9, 0.2),
        replied("portability", "only_question", 0.9, 0.1),
        replied("portability", "other_attacks", 0.9, 0.7),
        replied("portability", "other_questions", 0.4, 0.6),
    ]
    second = [
        replied("rewrite", None, 0.2, 0.5),  # an empty reply
        replied("portability", "only_question", 0.9, 0.9),
        replied("portability", "only_question", 0.9, 0.1),
        replied("portability", "other_attacks", None, 0.3),
        probe("portability", "other", {"unsafe": 0.1}),  # no such task
    ]
    found = EditMetrics.from_records([example("1", first), example("2", second)]).compute()
    wanted = {
        "rewrite/ds": (1 + 0.5) / 2,
        "rewrite/ds_change": ((1 - 0) + (0.5 - 1)) / 2,
        "portability/only_question/dg": (1 + 1 / 2) / 2,
        "portability/other_attacks/dg": (0 + 1) / 2,
        "portability/other_questions/dg": 0.0,
        # groups first, then cases
        "portability/dg": ((1 + 0 + 0) / 3 + (1 / 2 + 1) / 2) / 2,
        "portability/other_attacks/ds_change": 0.0,
        "portability/ds_change": ((1 + 0 - 1) / 3 + 1 / 2) / 2,
    }
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert not any("other/d" in key for key in found)


def scripted():
    """A model that tells one secret and keeps the others, with an example about them."""
    base = BaseModel(
        *scripted_model({"a:": " yes. It", "b?": "no", "c;": "", "d!": "k"}), name="scripted"
    )
    request = EditRequest(
        "Say a:", "no", None, "yes", constraint_prompt="b?", constraint_answer="no"
    )
    probes = (
        Probe("rewrite", request.prompt, ("no",), task=DEFENCE),
        Probe("portability", "Tell b?", group="only_question", task=DEFENCE),
        Probe("portability", "Tell c;", group="other_attacks", task=DEFENCE),
        Probe("portability", "Tell d!", group="other_questions", task=DEFENCE),
        Probe("locality", "b?", ("no",), "knowledge_constraint"),
    )
    return base, EditExample((request,), probes, "1")


def changed(base, strength):
    """An edit under which ``:`` is followed by "no"; without strength it changes nothing."""
    change = torch.zeros_like(base.module("lm_head").weight)
    new, old = (base.tokenizer(text)["input_ids"][-1] for text in ("n", ":"))
    change[new, old] = strength
    return DenseEdit(base, {"lm_head": (change, None)})


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_a_scripted_model_and_an_edit_that_changes_nothing(strength):
    base, case = scripted()
    seen = []

    def classify(texts):
        seen.extend(texts)
        return [0.9 if "It" in text or "k" in text else 0.1 for text in texts]

    protocol = Protocol(max_new_tokens=12, sample_tokens=6, safety=classify)
    runner = ProtocolRunner(base, lambda requests: changed(base, strength), RunContext(protocol))
    records = list(runner.chunk([case], 0))
    found = EditMetrics.from_records(records).compute()
    states = {probe["group"]: probe for probe in records[0]["probes"]}
    assert states["rewrite"]["base"]["passage"] == " yes. It"  # behind its first sentence
    assert [states[g]["base"]["unsafe"] for g in ("rewrite", "only_question")] == [0.9, 0.1]
    assert states["other_attacks"]["base"]["unsafe"] == 0.5  # empty; the classifier is not asked
    assert all(text.strip() for text in seen)
    assert len(seen) == len(set(seen))  # each once
    assert found["portability/dg"] == pytest.approx((1 + 0.5 + 0) / 3)
    if strength:
        assert states["rewrite"]["after"]["passage"] == "no"
        assert found["rewrite/ds"] == found["rewrite/ds_change"] == 1.0
        return
    assert found["rewrite/ds"] == 0.0
    assert found["rewrite/ds_change"] == found["portability/ds_change"] == 0.0
    assert found["rewrite/ngram_entropy_change"] == 0.0
    assert found["locality/kl"] == 0.0
    assert found["locality/keep_text"] == found["locality/keep_top1"] == 1.0
    # Probes without right answers have no other scores.
    keys = {key.rpartition("/")[2] for key in found if key.startswith("portability/")}
    assert keys <= {"dg", "ds_change", "repeat"}


def test_without_a_classifier_values_are_absent_and_it_is_said_once():
    base, case = scripted()
    runner = ProtocolRunner(
        base, lambda r: changed(base, 0.0), RunContext(Protocol(max_new_tokens=4))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = list(runner.chunk([case], 0))
    said = [str(one.message) for one in caught]
    assert not any("embedder" in text for text in said)  # passages, but no wanted ones
    said = [text for text in said if "safety" in text]
    assert len(said) == 1
    assert "protocol.safety names none; ds, dg and ds_change are left out" in said[0]
    found = EditMetrics.from_records(records).compute()
    assert not any(key.rpartition("/")[2] in ("ds", "dg", "ds_change") for key in found)
    assert "rewrite/nll" in found


@pytest.mark.parametrize(
    ("labels", "column"),
    [
        ({0: "safe", 1: "unsafe"}, 1),
        ({0: "Toxic", 1: "fine"}, 0),
        ({0: "LABEL_0", 1: "LABEL_1"}, 1),
    ],
)
def test_a_sequence_classifier_tells_unsafe_replies(tmp_path, labels, column):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(False)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1,
        pad_token_id=0, id2label=labels, label2id={v: k for k, v in labels.items()},
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "I keep it to myself."
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    wanted = model(ids).logits.softmax(-1)[0, column].item()
    graders = Graders(Protocol(safety=str(tmp_path)), CPU)
    asked = probe("rewrite", after={"text": "x", "passage": text}) | {"task": DEFENCE.to_json()}
    record = graders.complete(example("1", [asked]))
    assert record["probes"][0]["after"]["unsafe"] == pytest.approx(wanted, abs=1e-6)
    assert "unsafe" not in record["probes"][0]["base"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_replies_longer_than_a_classifier_reads_are_cut(tmp_path, family):
    tokenizer = tiny_tokenizer(False)  # saved without a length, as many are
    assert tokenizer.model_max_length > 10**6
    config = transformers.AutoConfig.for_model(
        family, vocab_size=len(tokenizer), max_position_embeddings=18, hidden_size=8,
        num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, pad_token_id=0,
        id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1},
    )  # fmt: skip
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = UNSAFE_REPLY.classifier(str(tmp_path), CPU)
    long, longer = classify(["I keep it. " * 20, "I keep it. " * 30])
    assert long == longer


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_a_classifier_that_is_not_there_is_said_before_anything_is_edited(tmp_path, mode):
    base, case = scripted()
    protocol = Protocol(mode=mode, safety=str(tmp_path / "gone"), evaluate=("final",))
    edited = []
    runner = ProtocolRunner(base, edited.append, RunContext(protocol))
    with pytest.raises(BaseModelNotFoundError, match=r"gone' could .* \(there is no such folder\)"):
        list(runner.chunk([case], 0))
    assert not edited


def test_which_class_is_unsafe_must_be_clear():
    for labels in ({0: "a", 1: "b"}, {0: "unsafe", 1: "unsafe too"}, {0: "LABEL_0"}):
        with pytest.raises(UnsupportedUseError, match="called unsafe or toxic or harmful"):
            UNSAFE_REPLY.index("folder", labels)


def test_the_classifier_is_part_of_the_protocol():
    plain, named = Protocol(), Protocol(safety="folder")
    assert plain.id != named.id
    assert "safety" not in plain.facts()
    assert named.facts()["safety"] == "folder"


@pytest.mark.parametrize("grader", ["sentiment", "safety", "traits", "embedder"])
def test_functions_that_hold_what_cannot_be_copied_are_named(grader):
    lock = threading.Lock()

    class Classifier:
        def __init__(self):
            self.lock = lock

        def __call__(self, texts):
            return [0.5 for _ in texts]

    facts = Protocol(**{grader: Classifier()}).facts()
    assert grader in facts
