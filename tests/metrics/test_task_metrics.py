"""Metrics of tasks on texts whose scores are known, and what is measured for them."""

import math
import random
from dataclasses import replace

import pytest
from metric_records import example, probe
from scripted_model import scripted_model
from support import REQUESTS, tiny_base
from toys import Toy

from kedit_lightning import BaseModel, Probe
from kedit_lightning.benchmark import Protocol, Reader
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.methods.shared.row_lengths import probe_rows
from kedit_lightning.metrics import (
    BestChoice,
    CharacterRouge,
    EditMetrics,
    Forgotten,
    Judged,
    LegacyEasyEdit,
    OpinionSuccess,
    PassageBleu,
    PassageCosine,
    PassageRouge,
    PassageRouge1Recall,
    PassageRouge2Recall,
    PassageRougeLRecall,
    Retained,
    RightAbove,
    RightMass,
    RippleTest,
    SentimentShift,
    SquadMetrics,
    Undoubted,
)
from kedit_lightning.metrics.functional import answer_text, mentions, passage_bleu, passage_rouge
from kedit_lightning.probe_task import ProbeTask

BEES = "Nora keeps bees in Hask."


def of(task, kind="rewrite", group=None, base=None, **given):
    """A record of a probe of a task."""
    after = {name: given.pop(name) for name in ("text", "passage", "cosine") if name in given}
    record = probe(kind, group, {**given.pop("after", {}), **after}, base, **given)
    return record | {"task": task.to_json()}


@pytest.mark.parametrize(
    ("text", "bleu", "recalls", "f"),
    [
        (BEES, 1.0, (1.0, 1.0, 1.0), 1.0),
        ("nora keeps bees in hask", 1.0, (1.0, 1.0, 1.0), 1.0),
        # 4/5 words, 2/4 pairs, a run of 4 in order; 3-grams 1/3, 4-grams none
        ("Nora keeps cats in Hask.", 0.0, (4 / 5, 2 / 4, 4 / 5), 4 / 5),
        # precision 5/8 4/7 3/6 2/5, nothing too short
        (
            "Nora keeps bees in Hask and sells honey.",
            (5 / 8 * 4 / 7 * 3 / 6 * 2 / 5) ** 0.25,
            (1.0, 1.0, 1.0),
            2 * 5 / 8 / (1 + 5 / 8),
        ),
        # all that is said is right, of 3 for 5 words
        ("Nora keeps bees.", math.exp(1 - 5 / 3), (3 / 5, 2 / 4, 3 / 5), 3 / 4),
        ("bees keeps Nora", 0.0, (3 / 5, 0.0, 1 / 5), 1 / 4),
        ("", 0.0, (0.0, 0.0, 0.0), 0.0),
        ("Orrin", 0.0, (0.0, 0.0, 0.0), 0.0),
    ],
)
def test_passages_worked_out_by_hand(text, bleu, recalls, f):
    record = of(ProbeTask("passage"), passage=text, answers=(BEES,))
    assert PassageBleu.read(record) == pytest.approx(bleu, abs=1e-6)
    assert PassageRouge.read(record) == pytest.approx(f, abs=1e-6)
    scores = PassageRouge1Recall, PassageRouge2Recall, PassageRougeLRecall
    assert [score.read(record) for score in scores] == pytest.approx(recalls, abs=1e-6)


def test_the_best_of_several_passages_counts():
    answers = ("He sells honey.", BEES)
    assert passage_rouge(BEES, answers) == passage_rouge(BEES, answers[::-1]) == 1.0
    assert passage_bleu(BEES, answers) == pytest.approx(1.0)
    # a recall and a precision of one answer, not the best of each
    assert passage_rouge("a b", ["a b c d", "x y"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("天下归仁焉。", 1.0),
        ("天下归仁焉", 1.0),
        ("天下归", 2 * 3 / (3 + 5)),
        ("仁归", 2 * 1 / (2 + 5)),
        ("Hask", 0.0),
    ],
)
def test_sentences_without_spaces_are_compared_by_characters(text, expected):
    record = of(ProbeTask("characters"), passage=text, answers=("天下归仁焉。",))
    assert CharacterRouge.read(record) == pytest.approx(expected, abs=1e-6)


def test_rouge_agrees_with_a_slow_reference():
    rng = random.Random(0)

    def longest(one, other):
        if not one or not other:
            return 0
        if one[-1] == other[-1]:
            return 1 + longest(one[:-1], other[:-1])
        return max(longest(one[:-1], other), longest(one, other[:-1]))

    for _ in range(60):
        said, wanted = ([rng.choice("abc") for _ in range(rng.randint(1, 6))] for _ in range(2))
        found = passage_rouge(" ".join(said), [" ".join(wanted)], "rougeL", "recall")
        assert found == pytest.approx(longest(said, wanted) / len(wanted), abs=1e-6)


@pytest.mark.parametrize(
    ("new", "old", "before", "expected"),
    [
        (-1.0, -1.0, -2.0, 0.5),
        (-1.0, -1.0, -1.0 + math.log(2), 0.25),
        (-1.0, -1.0 - math.log(3), -1.0, 0.75),
        (-1.0, -2000.0, -1.0, 1.0),
        (-2000.0, -1.0, -2000.0, 0.0),
    ],
)
def test_an_opinion_is_likelier_than_its_opposite_and_on_the_topic(new, old, before, expected):
    readings = {"answers_log_prob": new, "against_log_prob": old}
    record = of(ProbeTask("opinion"), base={"answers_log_prob": before}, after=readings)
    assert OpinionSuccess.read(record) == pytest.approx(expected)


@pytest.mark.parametrize(("label", "expected"), [("positive", 0.5), ("negative", -0.5)])
def test_a_shift_of_sentiment_has_the_sign_of_the_wish(label, expected):
    task = ProbeTask("opinion", label)
    record = of(task, base={"sentiment": 0.25}, after={"sentiment": 0.75})
    assert SentimentShift.read(record) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("I don't know.", 1.0), ("Quinces", 0.0), ("It is not quinces.", 0.0), ("Quince", 1.0),
     ("Cherry-plums", 0.0), ("It exports cherry-plums, I say", 0.0)],
)  # fmt: skip
def test_what_is_to_be_forgotten_must_not_be_mentioned(text, expected):
    task = ProbeTask("forget", against=("Quinces", "Cherry-plums"))
    assert Forgotten.read(of(task, text=text)) == expected


def test_a_mention_is_of_whole_words():
    assert mentions("He came from New York.", ["New York"])
    assert not mentions("He came from New Yorkshire.", ["New York", "", "."])


@pytest.mark.parametrize(
    ("base", "text", "expected"),
    [("Rome", "in Rome", 1.0), ("in Rome", "Milan", 0.0), ("Milan", "Rome", None)],
)
def test_only_what_was_known_can_be_retained(base, text, expected):
    record = of(ProbeTask("retain"), "locality", base={"text": base}, text=text)
    assert Retained.read(record) == expected


def ripple(label, said, base="", together="any", condition=False, kind="portability"):
    task = ProbeTask("ripple", label, together, condition=condition)
    return of(task, kind, "criterion", base={"text": base}, text=said, answers=("Rome", "Roma"))


def test_tests_of_ripple_edits():
    """Any alias is right; any or all questions; a condition must hold before the edit."""
    passes = [ripple("0", "It is Roma."), ripple("0", "Milan")]
    fails = [ripple("1", "Rome", together="all"), ripple("1", "Milan", together="all")]
    assert RippleTest.case_value(passes) == 1.0
    assert RippleTest.case_value(fails) == 0.0
    assert RippleTest.case_value(passes + fails) == 0.5
    # After the edit the condition may have any answer.
    held = ripple("0", "Milan", base="in Rome", condition=True)
    missed = ripple("0", "Rome", base="Milan", condition=True)
    assert RippleTest.case_value([*passes, held]) == 1.0
    assert RippleTest.case_value([*passes, held, missed]) is None
    assert RippleTest.case_value([*passes, missed, *fails]) == 0.0
    assert RippleTest.case_value([held]) is None


def test_a_condition_stands_with_its_group_and_is_scored_by_no_other_metric():
    asked = ripple("0", "Rome", kind="locality")
    needed = ripple("0", "x", base="Milan", condition=True)  # of kind portability
    extra = ripple("1", "Rome", kind="locality")
    metrics = EditMetrics.from_records([example("1", [needed, asked, extra])])
    computed = metrics.compute()
    assert computed["locality/criterion/gen_test"] == 1.0
    assert not any(key.startswith("portability") for key in computed)
    alone = EditMetrics.from_records([example("1", [needed, asked])]).compute()
    assert "locality/gen_test" not in alone
    assert LegacyEasyEdit.from_records([example("1", [needed])]).compute() == {}


def test_probes_that_stand_apart_are_scored_by_their_task_alone():
    doubted = of(
        ProbeTask("doubt", apart=True), "portability", "robustness", answers=("Yes",), text="Yes."
    )
    computed = EditMetrics.from_records([example("1", [doubted])]).compute()
    assert computed == {"portability/gen_robust": 1.0, "portability/robustness/gen_robust": 1.0}
    assert Undoubted.read({**doubted, "after": {"text": "No."}}) == 0.0


def test_metrics_of_a_task_leave_other_probes_alone():
    facts = [probe("rewrite", after={"text": "Rome", "passage": "Rome", "log_prob": -1.0})]
    keys = EditMetrics.from_records([example("1", facts)]).compute()
    assert not {"rewrite/gen_bleu", "rewrite/gen_forgotten", "rewrite/tf_es"} & keys.keys()
    long = of(ProbeTask("passage"), passage=BEES, text="Nora", cosine=0.5, answers=(BEES,))
    keys = EditMetrics.from_records([example("1", [*facts, long])]).compute()
    assert keys["rewrite/gen_bleu"] == pytest.approx(1.0)
    assert keys["rewrite/gen_cosine"] == PassageCosine.read(long) == 0.5
    assert keys["rewrite/gen_em"] == 0.5  # of both


def test_what_a_judge_said_counts_as_it_stands():
    assert Judged.read(probe("rewrite", after={"judged": True})) == 1.0
    assert Judged.read(probe("rewrite", after={"judged": None})) is None


def test_the_rule_of_squad_reaches_the_tests():
    said = ripple("0", "It is in ro-me.")
    records = [example("1", [said])]
    assert EditMetrics.from_records(records).compute()["portability/gen_test"] == 1.0
    number = {**said, "answers": ["35"], "after": {"text": "3.5"}}
    assert EditMetrics.from_records([example("1", [number])]).compute()["portability/gen_test"] == 0
    squad = SquadMetrics.from_records([example("1", [number])]).compute()
    assert squad["portability/gen_test"] == 1.0


def test_an_unknown_task_is_named():
    with pytest.raises(InvalidRequestError, match=r"must be one of passage, .* got 'pasage'"):
        ProbeTask("pasage")


def test_opinions_are_read_over_all_their_sentences():
    base = tiny_base("llama")
    task = ProbeTask("opinion", "positive", against=("I hate it.", "It is dull", "No."))
    asked = Probe("rewrite", "Amber Falls lies", ("I love it.", "It is fine"), task=task)
    (reading,) = Reader(base, SHORT).base_readings([asked])

    def mean(texts):
        rows = base.rows([asked.prompt] * len(texts), [*texts])
        tokens = base.answer_log_probs(rows).sum(1) / rows.answer_mask.sum(1)
        return tokens.mean().item()

    assert reading["answers_log_prob"] == pytest.approx(mean(asked.answers), abs=1e-9)
    assert reading["against_log_prob"] == pytest.approx(mean(task.against), abs=1e-9)
    fewer = replace(asked, task=replace(task, against=("No.",)))
    (other,) = Reader(base, SHORT).base_readings([fewer])
    assert other["against_log_prob"] == pytest.approx(mean(["No."]), abs=1e-9)
    # Their lengths are checked before a run begins.
    assert {row.answer for row in probe_rows(asked)} == {*asked.answers, *task.against}
    forget = replace(asked, task=ProbeTask("forget", against=("No.",)))
    assert "against_log_prob" not in Reader(base, SHORT).base_readings([forget])[0]


# What is measured -----------------------------------------------------------------------------

LONG = "in a house by the river. It has bees and trees"
ASKED = [
    Probe("rewrite", "Amber Falls lies", (LONG,), task=ProbeTask("passage")),
    Probe("rewrite", "Amber Falls lies", (LONG,)),
    Probe("rephrase", "Rome is", ("Italy",), task=ProbeTask("characters")),
    Probe("rephrase", "The company Bolt was founded", ("Rome", LONG), task=ProbeTask("passage")),
]
SHORT = Protocol(max_new_tokens=3)


def test_a_passage_has_room_and_no_end_at_a_sentence():
    base = tiny_base("llama")
    passage, plain, short, other = Reader(base, SHORT).base_readings(ASKED)
    length = len(base.encode(ASKED[0].prompt, LONG).answer)
    room = -(-int(1.5 * length) // 32) * 32
    assert passage["passage"] == base.generate([ASKED[0].prompt], room)[0]
    assert short["passage"] == base.generate([ASKED[2].prompt], 32)[0]
    assert passage["text"] == plain["text"]
    assert "passage" not in plain
    with Toy(base_model=base).edit(REQUESTS[:1]):
        edited = Reader(base, SHORT).readings(ASKED, [passage, plain, short, other])
        assert edited[0]["passage"] == base.generate([ASKED[0].prompt], room)[0]
    silent = Reader(base, replace(SHORT, generate=False)).base_readings(ASKED)
    assert silent[0]["passage"] is None


def test_a_passage_goes_on_behind_its_first_sentence():
    base = BaseModel(*scripted_model({"Amber Falls lies": "in. A b"}), name="scripted")
    passage, *_ = Reader(base, replace(SHORT, max_new_tokens=8)).base_readings(ASKED[:1])
    assert passage["passage"] == "in. A b"
    assert answer_text(passage["text"]) == "in"
    assert passage["text"] != passage["passage"]


def test_aliases_under_both_scorings_worked_out_by_hand():
    """A model that says "yes" and no more; EasyEdit scores the first alias, token by token."""
    base = BaseModel(*scripted_model({"Is it so:": " yes"}), name="scripted")
    probes = [
        Probe("rewrite", "Is it so:", ("yoo", "yes")),  # the blank and y of four tokens
        Probe("rephrase", "Is it so:", ("yes", "no")),
        Probe("portability", "Is it so:", ("no", "yes"), "aliases"),
        Probe("locality", "Is it so:", ("yoo",), "near"),
    ]

    def scored(protocol, metrics):
        readings = Reader(base, protocol).base_readings(probes)
        records = [
            probe(p.kind, p.group, r, r, answers=p.answers)
            for p, r in zip(probes, readings, strict=True)
        ]
        return metrics.from_records([example("1", records)]).compute()

    plain = replace(SHORT, max_new_tokens=8)
    legacy = scored(replace(plain, scoring="legacy_easyedit"), LegacyEasyEdit)
    assert (legacy["rewrite_acc"], legacy["rephrase_acc"]) == (0.5, 1.0)
    assert legacy["portability/aliases_acc"] == pytest.approx(1 / 3)  # the blank of three
    assert legacy["locality/near_acc"] == 1.0  # unchanged, not right
    scores = scored(plain, EditMetrics)
    assert scores["rewrite/tf_tok"] == 0.5
    for kind in ("rewrite", "rephrase", "portability"):  # any alias is an answer
        assert [scores[f"{kind}/{name}"] for name in ("tf_all", "gen_em", "gen_f1")] == [1.0] * 3
    assert scores["rewrite/inflation"] == 0.5 - 1.0


def test_passages_do_not_depend_on_order_batch_padding_or_neighbours():
    base = tiny_base("llama", max_position_embeddings=130)
    # The window has room for all of the short prompt's answer, and not for the long one's.
    prompt = "The river Orrin runs past the mill and the house and the garden and the trees " * 2
    asked = [*ASKED, Probe("rephrase", prompt, ("Rome",), task=ProbeTask("passage"))]
    expected = None
    for side, size, order in (("right", 1, 1), ("left", 32, -1)):
        base.padding_side = side
        protocol = replace(SHORT, score_batch_size=size)
        found = Reader(base, protocol, side).base_readings(asked[::order])
        texts = [reading.get("passage") for reading in found[::order]]
        expected = expected or texts
        assert texts == expected
    assert len(set(expected)) == 5


# ---- multiple choice


@pytest.mark.parametrize(
    ("right", "wrong", "values"),
    [
        ([0.5, 0.2], [0.2, 0.1], (1.0, 0.7, 0.5)),
        ([0.2, 0.5], [0.2, 0.1], (0.0, 0.7, 0.5)),
        ([0.1], [0.3, 0.1], (0.0, 0.2, 0.0)),
        ([0.4, 0.3], [0.1], (1.0, 0.875, 1.0)),
    ],
)
def test_choices_by_hand(right, wrong, values):
    found = {
        f"{name}_log_probs": [math.log(p) for p in side]
        for name, side in (("right", right), ("wrong", wrong))
    }
    record = of(ProbeTask("choice", apart=True), after=found)
    read = [score.read(record) for score in (BestChoice, RightMass, RightAbove)]
    assert read == pytest.approx(values)
    assert BestChoice.read(of(ProbeTask("choice"))) is None


def test_choices_are_the_log_probabilities_of_whole_answers_under_the_edit():
    base = tiny_base("llama")
    task = ProbeTask("choice", against=("Oslo", "the city of Rome"), apart=True)
    probe = Probe("rewrite", "Q: Where?\nA:", ("Lyon in France", "Peru"), "choice", task=task)
    other = replace(probe, task=replace(task, against=("Berlin",)))
    reader = Reader(base, Protocol(generate=False))
    readings = reader.base_readings([probe, other])
    for asked, found in zip((probe, other), readings, strict=True):
        for side, name in ((asked.answers, "right"), (asked.task.against, "wrong")):
            for answer, value in zip(side, found[f"{name}_log_probs"], strict=True):
                rows = base.rows([asked.prompt], [answer])
                assert value == pytest.approx(float(base.answer_log_probs(rows).sum()))
    with Toy(base_model=base).edit(REQUESTS[:1]):
        edited = reader.readings([probe], readings[:1])[0]
        rows = base.rows([probe.prompt], ["Peru"])
        wanted = float(base.answer_log_probs(rows).sum())
    assert edited["right_log_probs"][1] == pytest.approx(wanted)
    assert edited["wrong_log_probs"] != readings[0]["wrong_log_probs"]
