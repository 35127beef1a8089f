"""PROMPT and ICE: which facts stand before a question, in which words and order."""

from __future__ import annotations

import pytest
from support import REQUESTS, tiny_base

from kedit_lightning import EditRequest
from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.edits.kinds.prompt.prompt_edit import retrieval
from kedit_lightning.errors import MissingExtraError, UnsupportedUseError
from kedit_lightning.methods import ICE, IKE, PROMPT

TOWER, CURIE, LYON, FALLS = REQUESTS
#: The tests apply edits of one base model in other orders than they were made.
pytestmark = pytest.mark.filterwarnings("ignore:.*was computed on top of")
QUESTION = "Where was Marie Curie born?"


def roomy(text):
    return 1


def text(edits, question=QUESTION, room=roomy):
    """What a question becomes under edits."""
    (base,) = {edit.base for edit in edits}
    for edit in edits:
        edit.apply()
    try:
        return base.edits.render(question, room)
    finally:
        base.edits.clear()


@pytest.fixture
def base():
    return tiny_base("llama", max_position_embeddings=4096)


def line(request):
    return f"New Fact: {request.prompt} {request.target_new}\n"


# ---- words


def test_prompt_is_ike_without_demonstrations_byte_for_byte(base):
    edit = PROMPT(base).edit([TOWER])
    assert text([edit]) == (
        "New Fact: The Eiffel Tower is in the city of Rome\nPrompt: Where was Marie Curie born?"
    )
    assert text([edit]) == text([IKE(base, demonstrations=0).edit([TOWER])])


def test_ice_asks_to_answer_with_the_fact(base):
    edit = ICE(base, instruction="Believe this.\n").edit([TOWER])
    told = "New Fact: The Eiffel Tower is in the city of Rome.\nPrompt: "
    assert text([edit]) == f"Believe this.\n{told}{QUESTION}"
    assert text([ICE(base, instruction="").edit([TOWER])]) == told + QUESTION
    default = text([ICE(base).edit([TOWER])])
    assert default.endswith(told + QUESTION)
    assert len(default) > len(told + QUESTION)
    stopped = EditRequest("The tower is in", "St. Louis.", "tower")
    assert "St. Louis.\n" in text([ICE(base).edit([stopped])])


@pytest.mark.parametrize("method", [PROMPT, ICE])
def test_fact_and_question_stand_there_once_and_rollback_gives_the_tokens_back(base, method):
    before = base.encode(QUESTION)
    with method(base).edit([TOWER]):
        during = base.encode(QUESTION)
        words = base.tokenizer.decode(during.prompt)
        assert words.count(TOWER.target_new) == words.count(QUESTION) == 1
        assert during.prompt.count(base.tokenizer.bos_token_id) == 1
    assert base.encode(QUESTION) == before


@pytest.mark.parametrize("method", [PROMPT, ICE])
def test_answers_of_a_batch_are_those_of_single_rows(method):
    base = tiny_base("gpt2", n_positions=512)
    questions = [QUESTION, "Amber Falls lies in", "x"]
    with method(base).edit(REQUESTS):
        together = base.generate(questions, max_new_tokens=5)
        assert together == [base.generate([q], max_new_tokens=5)[0] for q in questions]


# ---- which facts


def test_of_several_facts_the_most_similar_ones_are_stated_the_most_similar_last(base):
    one = text([PROMPT(base).edit(REQUESTS)])
    assert one == line(CURIE) + "Prompt: " + QUESTION
    two = text([PROMPT(base, top_k=2).edit(REQUESTS)])
    assert two.endswith(one)
    assert two.count("New Fact") == 2
    # It makes no difference whether they are of one edit or of several.
    alone = [PROMPT(base, top_k=2).edit([request]) for request in REQUESTS]
    assert text(alone) == two
    all_four = text([PROMPT(base, top_k=4).edit(REQUESTS)])
    assert all_four.endswith(two)
    assert text([PROMPT(base, top_k=9).edit(REQUESTS)]) == all_four


def test_all_facts_are_stated_in_the_order_in_which_they_were_written(base):
    edits = [PROMPT(base, top_k=None).edit([request]) for request in REQUESTS]
    whole = "".join(map(line, REQUESTS)) + "Prompt: " + QUESTION
    assert text(edits) == text([PROMPT(base, top_k=None).edit(REQUESTS)]) == whole
    assert sorted(text([PROMPT(base, top_k=4).edit(REQUESTS)]).split("\n")) == sorted(
        whole.split("\n")
    )
    with edits[1], edits[0], edits[3]:
        edits[0].rollback()
        assert base.edits.render("?", roomy) == line(CURIE) + line(FALLS) + "Prompt: ?"


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_a_fact_that_was_overwritten_is_not_stated(base, top_k):
    newer = EditRequest(CURIE.prompt, "Lima", CURIE.subject)
    method = PROMPT(base, top_k=top_k)
    stated = text([method.edit([CURIE]), method.edit([newer]), method.edit([TOWER])])
    assert "Lima" in stated
    assert CURIE.target_new not in stated


def test_an_instruction_stands_once_before_all_facts(base):
    told = text([ICE(base, top_k=None).edit(REQUESTS)])
    first = ICE(base).settings.instruction
    assert told.startswith(first + "New Fact: ")
    assert told.count(first) == 1
    assert told.count("New Fact: ") == 4


# ---- lengths


@pytest.mark.parametrize("top_k", [4, None])
def test_where_the_window_is_short_facts_in_front_are_dropped_never_the_best(base, top_k):
    edit = PROMPT(base, top_k=top_k).edit(REQUESTS)
    whole = text([edit])
    kept = line(CURIE) + "Prompt: " + QUESTION
    facts = [part for part in whole.split("\n") if part.startswith("New Fact")]
    for room in range(5):
        short = text([edit], room=lambda prompt, room=room: room - prompt.count("New Fact"))
        left = [part for part in short.split("\n") if part.startswith("New Fact")]
        assert len(left) == max(1, room) if room < 5 else 4
        assert line(CURIE) in short
        others = [fact for fact in facts if fact + "\n" != line(CURIE)]
        dropped = others[: 4 - max(1, room)]
        assert left == [fact for fact in facts if fact not in dropped]
    assert text([edit], room=lambda prompt: -1) == kept


def test_demonstrations_go_before_other_facts_do():
    entries = [
        PromptEntry("a", "Prompt: ", fact="A\n"),
        PromptEntry("b", "Prompt: ", ("1\n", "2\n"), "B\n", "Do.\n", None),
        PromptEntry("c", "Prompt: ", fact="C\n"),
    ]
    rewrite = retrieval([entries])
    texts = [rewrite("b", lambda text, most=most: text.count("\n") <= most) for most in range(8)]
    whole = "1\n2\nDo.\nA\nB\nC\nPrompt: b"
    assert texts[6:] == [whole, whole]
    assert texts[5] == whole.removeprefix("1\n")
    assert texts[4] == "Do.\nA\nB\nC\nPrompt: b"
    assert texts[3] == "Do.\nB\nC\nPrompt: b"
    assert texts[:3] == ["Do.\nB\nPrompt: b"] * 3


# ---- files and settings


def test_a_saved_edit_states_the_same(base, tmp_path):
    edits = [ICE(base, top_k=2).edit(REQUESTS[:3]), PROMPT(base, top_k=None).edit(REQUESTS[2:])]
    before = text(edits)
    paths = [edit.save(tmp_path / f"{i}.safetensors") for i, edit in enumerate(edits)]
    assert len(paths) == 2
    again = [PromptEdit.load(tmp_path / f"{i}.safetensors", base) for i in range(2)]
    assert text(again) == before


def test_entries_of_older_files_are_read(base):
    values = {"entries": [{"key": "a", "context": "A\n", "demonstrations": ["1\n"]}]}
    edit = PromptEdit.from_state(base, PROMPT(base).edit([TOWER]).origin, {}, values)
    assert text([edit], "?") == "1\nA\n?"


def test_refuses_to_state_no_fact(base):
    with pytest.raises(UnsupportedUseError, match="top_k"):
        PROMPT(base, top_k=0).edit([TOWER])


def test_an_encoder_that_is_not_installed_is_named(base):
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"kedit-lightning\[retrieval\]"):
            text([PROMPT(base, retriever="some-encoder").edit(REQUESTS)])
    else:
        pytest.skip("sentence-transformers is installed")
