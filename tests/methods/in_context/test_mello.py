"""MeLLo: sub-questions, retrieval and contradictions, with scripted models and with tiny ones."""

from __future__ import annotations

import json

import pytest
from support import REQUESTS, tiny_base

from kedit_lightning import Edit, EditRequest
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.edits.kinds.prompt.decomposition import Decomposition, decompose
from kedit_lightning.edits.kinds.prompt.decomposition_edit import DecompositionEdit, MultiHopPlan
from kedit_lightning.edits.kinds.prompt.fact_store import FactStore, StoredFact
from kedit_lightning.edits.kinds.prompt.scratchpad import (
    DEMONSTRATIONS,
    FINAL,
    RETRIEVED,
    subquestion_in,
    transcript,
)
from kedit_lightning.errors import DataFileNotFoundError, EditFileError, InvalidRequestError
from kedit_lightning.methods import MeLLo

QUESTION = "On which continent did Ada die?"
#: What a model writes about it, which has not heard of the edit: Ada died in Lima.
KNOWN = {"Where did Ada die?": "Rome", "On which continent is Lima?": "South America"}
FACTS = [
    StoredFact("Ada died in", "Lima", "Ada died in Lima", "Ada"),
    StoredFact("The inventor of radio is", "Bo", "The inventor of radio is Bo", "radio"),
]


class Scripted:
    """A model that takes the question above apart; it notes what it was asked."""

    def __init__(self, chain=("Where did Ada die?", "On which continent is {}?")):
        self.chain, self.calls, self.written = chain, 0, 0

    def __call__(self, text, stops):
        self.calls += 1
        assert text.startswith("".join(DEMONSTRATIONS))
        whole = text.removeprefix("".join(DEMONSTRATIONS))
        new = ""
        if RETRIEVED in whole:
            lines = whole.strip().split("\n")
            fact, own = (lines[i].partition(": ")[2] for i in (-1, -2))
            about = subquestion_in(whole)
            # A fact contradicts an answer to the same question that it does not hold.
            against = "Ada" in about and "Ada" in fact and own not in fact
            answer = fact.split()[-1] if against else own
            verb = "contradicts" if against else "does not contradict"
            new = f"Retrieved fact {verb} generated answer, so the intermediate answer is: {answer}"
            new += "\n"
            if self.written == len(self.chain):
                return (f"{new}", FINAL) if FINAL in stops else (new, "")
        question = self.chain[self.written].replace("{}", new.split()[-1] if new else "")
        self.written += 1
        return f"{new}Subquestion: {question}\nGenerated answer: {KNOWN[question]}\n", RETRIEVED


def retrieve(question):
    return FactStore(FACTS, "lexical").nearest(question).sentence


# ---- the scratchpad


def test_a_scripted_model_is_led_to_the_answer_that_the_edit_implies():
    model = Scripted()
    text = transcript(QUESTION, model, retrieve, hops=4)
    own = text.removeprefix("".join(DEMONSTRATIONS))
    assert own == (
        "Question: On which continent did Ada die?\n"
        "Subquestion: Where did Ada die?\n"
        "Generated answer: Rome\n"
        "Retrieved fact: Ada died in Lima\n"
        "Retrieved fact contradicts generated answer, so the intermediate answer is: Lima\n"
        "Subquestion: On which continent is Lima?\n"
        "Generated answer: South America\n"
        "Retrieved fact: Ada died in Lima\n"
        "Retrieved fact does not contradict generated answer, so the intermediate answer is: "
        "South America\n"
        "Final answer:"
    )
    assert model.calls == 3


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_hops_are_capped(hops):
    asked = []

    def endless(text, stops):
        asked.append(text)
        return "so it is: A\nSubquestion: Who is A?\nGenerated answer: A\n", RETRIEVED

    text = transcript(QUESTION, endless, retrieve, hops)
    assert text.count(RETRIEVED) - "".join(DEMONSTRATIONS).count(RETRIEVED) == hops
    assert len(asked) == hops + 1  # the last one draws its conclusion
    assert text.endswith("\nFinal answer:")


def test_a_model_that_asks_nothing_answers_directly():
    for new, stop in (("nonsense", ""), ("", "\nQuestion:"), ("\n\n", RETRIEVED)):
        text = transcript(QUESTION, lambda *call, new=new, stop=stop: (new, stop), retrieve, 4, ())
        assert text == f"Question: {QUESTION}\nFinal answer:"


def test_without_a_store_it_is_the_plain_chain_of_thought():
    seen = []

    def model(text, stops):
        seen.append(stops)
        return "Subquestion: Who?\nGenerated answer: Bo\nRetrieved fact: Bo\n", FINAL

    text = transcript("Why?", model, None, 4, ("D\n",))
    assert text == (
        "D\nQuestion: Why?\nSubquestion: Who?\nGenerated answer: Bo\nRetrieved fact: Bo\n"
        "Final answer:"
    )
    assert len(seen) == 1
    assert RETRIEVED not in seen[0]


@pytest.mark.parametrize("room", range(1, 14))
def test_demonstrations_are_dropped_as_the_scratchpad_grows(room):
    seen = []

    def model(text, stops):
        seen.append(text)
        return "Subquestion: Who is Bo?\nGenerated answer: Bo\n", RETRIEVED

    def fits(text):
        return text.count("\n") < room

    text = transcript("Why?", model, retrieve, 3, ("1\n", "2\n", "3\n"), fits)
    assert fits(text) or text == f"Question: Why?\n{FINAL}"
    assert text.endswith(FINAL)
    assert all(fits(part) for part in seen) or room == 1
    dropped = 3 - sum(text.count(f"{number}\n") for number in (1, 2, 3))
    assert text.startswith("1\n2\n3\n"[2 * dropped :] + "Question: Why?")


# ---- the store


def test_a_stored_sentence_is_the_nearest_to_itself_and_the_latest_holds():
    newer = StoredFact("Ada  died in", "Oslo", "Ada died in Oslo", "Ada")
    store = FactStore([*FACTS, newer], "lexical")
    for fact in (FACTS[1], newer):
        assert store.nearest(fact.sentence) == fact
    assert len(store.facts) == 2
    assert store.nearest("ada died  in").answer == "Oslo"


def test_a_fact_concerns_questions_about_its_subject():
    ada, bare = FACTS[0], StoredFact("Ada died in", "Lima", "Ada died in Lima")
    assert ada.concerns("Where did ada die?")
    assert not ada.concerns("Where did Adalbert die?")
    assert bare.concerns("ADA died in")
    assert not bare.concerns("Where did Ada die?")


# ---- given decompositions

FORMS = [
    {"question": "The continent of the city where {} died is", "steps": ["{} died in", "{} is in"]},
    {"question": "The mayor of {} is", "steps": ["The mayor of {} is"]},
]


@pytest.fixture
def forms(tmp_path):
    path = tmp_path / "forms.json"
    path.write_text(json.dumps(FORMS))
    return str(path)


def test_forms_of_questions_are_taken_apart():
    known = [Decomposition(form["question"], tuple(form["steps"])) for form in FORMS]
    assert decompose("the mayor of St. Louis (USA) is", known) == (
        "St. Louis (USA)",
        ("The mayor of {} is",),
    )
    assert decompose("The mayor of is", known) is None
    assert decompose("Not the mayor of Rome is", known) is None


class Answering:
    """A base model that notes the questions it is asked on the way."""

    def __init__(self, base, answers):
        self.base, self.answers, self.asked = base, answers, []

    def __getattr__(self, name):
        return getattr(self.base, name)

    def generate(self, prompts, *settings, **options):
        self.asked += prompts
        return [self.answers[prompt] for prompt in prompts]


def test_a_step_that_is_a_stored_prompt_has_its_answer_and_others_are_asked():
    ada = EditRequest("Ada died in", "Lima", "Ada")
    base = tiny_base("llama")
    plan = MultiHopPlan(
        (
            Decomposition(
                "The land of the city where {} died is",
                ("{} died in", "The land of {} is", "The friend of {} is"),
            ),
        )
    )
    model = Answering(base, {"The land of Lima is": " Peru. It"})
    edit = DecompositionEdit(model, [FACTS[0]], plan)
    (effect,) = edit.effects()
    rewrite = effect.build([effect.content])
    question = "The land of the city where Ada died is"
    assert rewrite(question, bool) == "The friend of Peru is"
    assert rewrite(question, bool) == "The friend of Peru is"
    assert model.asked == ["The land of Lima is"]  # once
    # Other questions are asked as they are, behind a fact that concerns them.
    assert rewrite("Bo lives in", bool) == "Bo lives in"
    told = "New Fact: Ada died in Lima\nPrompt: "
    assert rewrite(ada.prompt, bool) == told + ada.prompt
    turns = json.dumps([{"role": "user", "content": question}])
    assert json.loads(rewrite(turns, bool))[0]["content"] == "The friend of Peru is"


def test_several_edits_are_one_store_read_by_the_newest_plan(forms):
    base = tiny_base("llama")
    given, own = MeLLo(base, decompositions=forms), MeLLo(base)
    first = own.edit([EditRequest("Ada died in", "Lima", "Ada")])
    with first:
        second = given.edit([EditRequest("Bo died in", "Oslo", "Bo")])
        with second:
            question = "The continent of the city where Ada died is"
            assert base.edits.render(question, bool) == "Lima is in"
            assert base.edits.render("Bo died in", bool).startswith("New Fact: Bo died in Oslo\n")
        # The older one leaves it to the model, whose window is too short for a scratchpad.
        assert base.edits.render(question, lambda text: 89 - len(text)).endswith(FINAL)
    assert base.edits.render(question, bool) == question


def test_a_saved_edit_asks_the_same(forms, tmp_path):
    base = tiny_base("llama")
    edit = MeLLo(base, decompositions=forms, hops=2).edit([*REQUESTS])
    path = tmp_path / "edit.safetensors"
    edit.save(path)
    again = Edit.load(path, base)
    assert again.plan == edit.plan
    assert again.facts == edit.facts
    tensors, values = json.loads(json.dumps(edit.state()))
    for wrong in (
        {**values, "facts": []},
        {**values, "plan": {**values["plan"], "hops": 0}},
        {**values, "more": 1},
        {**values, "plan": {**values["plan"], "decompositions": [{"question": "a {}"}]}},
    ):
        with pytest.raises(EditFileError):
            DecompositionEdit.from_state(base, edit.origin, tensors, wrong)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "list of decompositions"),
        ("{", "no JSON"),
        ('[{"question": "a {}"}]', "entry 0"),
        ('[{"question": "a {}", "steps": ["b {}"], "more": 1}]', "entry 0"),
        ('[{"question": "a {}", "steps": []}]', "no steps"),
        ('[{"question": "a {} {}", "steps": ["b {}"]}]', "exactly once"),
        ('[{"question": "a {}", "steps": ["b"]}]', "exactly once"),
    ],
)
def test_files_of_decompositions_that_are_wrong_are_refused(text, told, tmp_path):
    path = tmp_path / "forms.json"
    path.write_text(text)
    with pytest.raises(InvalidRequestError, match=told):
        MeLLo(tiny_base("llama"), decompositions=str(path)).edit([REQUESTS[0]])
    with pytest.raises(DataFileNotFoundError, match="absent"):
        MeLLo(tiny_base("llama"), decompositions=str(tmp_path / "absent")).edit([REQUESTS[0]])


# ---- with a model


def test_a_tiny_model_is_asked_with_stop_strings_and_answers_behind_the_scratchpad():
    base = tiny_base("gpt2", n_positions=2048)
    questions = ["Where is it?", "x"]
    before = base.generate(questions, max_new_tokens=3)
    edit = MeLLo(base, max_new_tokens=4, hops=1).edit(REQUESTS)
    with edit:
        text = base.edits.render(questions[0], lambda text: True)
        assert text.startswith(DEMONSTRATIONS[0])
        assert text.endswith(FINAL)
        together = base.generate(questions, max_new_tokens=3)
        assert together == [base.generate([q], max_new_tokens=3)[0] for q in questions]
        assert len(base.rows(["Where is it?"], ["Rome"])) == 1
    assert base.generate(questions, max_new_tokens=3) == before


def test_demonstrations_of_an_earlier_edit_leave_room_for_the_fact(forms):
    base = tiny_base("llama", max_position_embeddings=128)
    shown = tuple(f"New Fact: Number {n} is red\n" for n in range(20))
    entry = PromptEntry("Ada died in", "", shown, "New Fact: Ada died in Rome\n")
    with PromptEdit(base, [entry]):
        alone = base.encode("Bo died in", "Oslo").prompt
        with MeLLo(base, decompositions=forms).edit([EditRequest("Bo died in", "Oslo", "Bo")]):
            both = base.encode("Bo died in", "Oslo").prompt
    assert 128 - 15 < len(alone) < 128 > len(both)
    text = base.tokenizer.decode(both)
    assert "Bo died in Oslo" in text
    assert 0 < text.count("is red") < base.tokenizer.decode(alone).count("is red")


def test_a_longer_answer_leaves_fewer_demonstrations(forms):
    """Whatever was asked before: what is kept for speed are continued texts, not whole prompts."""
    base = tiny_base("llama", max_position_embeddings=512)
    with MeLLo(base).edit([EditRequest("Bo died in", "Oslo", "Bo")]):
        short = base.encode("Where did Bo die?", "Oslo")
        long = base.encode("Where did Bo die?", "Oslo " * 40)
        assert base.encode("Where did Bo die?", "Oslo") == short
    assert len(long.prompt) + len(long.answer) <= 512
    assert len(long.prompt) < len(short.prompt)
