"""Texts that look alike: how a subject is found in its prompt, and what messages name."""

from __future__ import annotations

import unicodedata

import pytest

from kedit_lightning import EditRequest, Probe
from kedit_lightning.character_forms import comparable, is_unicode, spans_of, trimmed
from kedit_lightning.errors import InvalidRequestError

CITY = "S\u00e3o Tom\u00e9"
NFD = unicodedata.normalize("NFD", CITY)


@pytest.mark.parametrize(
    ("written", "subject"),
    [
        (NFD, CITY),
        (CITY, NFD),
        ("S\u00e3o\u00a0Tom\u00e9", CITY),
        (CITY, "S\u00e3o\u202fTom\u00e9"),
        ("\uff33\u00e3o Tom\u00e9", CITY),
        ("S\u00e3o\u3000Tom\u00e9", NFD),
        ("S\u00e3o  Tom\u00e9", CITY),
        ("S\u00e3o Tom\u00ad\u00e9", CITY),
        ("O\u2019Brien", "O'Brien"),
        ("Jean\u2011Luc", "Jean-Luc"),
        ("Vie\u0323\u0302t", "Vi\u1ec7t"),
        ("\u1100\u1161\u11a8", "\uac01"),
        ("\uff76\uff9e", "\u30ac"),
        ("\ufb01n", "fin"),
    ],
)
def test_a_subject_in_another_form_is_taken_as_the_prompt_has_it(
    written: str, subject: str
) -> None:
    request = EditRequest(f"The town of {written} is in", "Chile", subject)
    assert request.subject == written
    assert comparable(written) == comparable(subject)


def test_a_part_of_a_character_is_no_subject() -> None:
    assert spans_of("\uac00", "\u1100\u1161\u11a8") == []
    assert spans_of("fi\u0301", "\ufb01\u0301n") == ["\ufb01\u0301"]
    assert spans_of("f", "\ufb01n") == []


def test_two_forms_in_one_prompt_are_refused_with_their_characters() -> None:
    prompt = f"{NFD} and \uff33\u00e3o Tom\u00e9 lie in"
    with pytest.raises(InvalidRequestError, match=r"has it in 2 forms; .*U\+FF33.*U\+0053"):
        EditRequest(prompt, "Chile", CITY)


@pytest.mark.parametrize(
    ("prompt", "subject", "clause"),
    [
        ("P\u0430ris is in", "Paris", r"has 'P\u0430ris', with '\u0430' \(U\+0430\) for 'a' \(U"),
        ("The eiffel tower is", "Eiffel Tower", "with 'e' for 'E', 't' for 'T'; write it exactly"),
        ("Malm\u00f6 is in", "Malmo", r"with '\u00f6' \(U\+00F6\) for 'o'"),
        ("Berlin is in", "Paris", r"'Berlin is in'; write it exactly"),
        ("in", "Paris", r"'in'; write it exactly"),
    ],
)
def test_characters_that_differ_are_named(prompt: str, subject: str, clause: str) -> None:
    with pytest.raises(InvalidRequestError, match=clause):
        EditRequest(prompt, "Chile", subject)


@pytest.mark.parametrize(
    "edge", [" ", "\n", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", " \r\n "]
)
def test_white_space_at_edges_is_dropped_wherever_answers_enter(edge: str) -> None:
    request = EditRequest(
        "Paris is in", f"{edge}New York{edge}", f"{edge}Paris{edge}", f"Rome{edge}"
    )
    assert request == EditRequest("Paris is in", "New York", "Paris", "Rome")
    assert request.trimmed == ("target_new", "target_old", "subject")
    probe = Probe("locality", "Paris is in ", (f"a b{edge}", f"{edge}c"), contrast=f"d{edge}")
    assert probe == Probe("locality", "Paris is in ", ("a b", "c"), contrast="d")
    assert probe.trimmed == ("answers", "contrast")
    assert Probe("rephrase", f"{edge}Where? ", ("a",)).prompt == "Where?"
    assert Probe("rewrite", "A:\n", ("a",)).trimmed == ()


def test_a_rephrase_keeps_its_last_line_break() -> None:
    assert Probe("rephrase", " Q\nA: \n", ("a",)).prompt == "Q\nA: \n"
    assert trimmed("\n a \n") == "a"


@pytest.mark.parametrize("half", ["\ud800", "a\udfff", "\udcff b"])
def test_text_that_utf_8_cannot_hold_is_refused_by_field(half: str) -> None:
    assert not is_unicode(half)
    for field in ("prompt", "target_new", "subject", "target_old", "id", "task"):
        fields = {"prompt": "Paris is in", "target_new": "Chile", field: half}
        with pytest.raises(InvalidRequestError, match=f"field '{field}' holds .* as UTF-8"):
            EditRequest(**fields)
    for field, value in [("prompt", half), ("answers", (half,)), ("group", half)]:
        fields = {"kind": "locality", "prompt": "Paris is in", field: value}
        with pytest.raises(InvalidRequestError, match=f"field '{field}' holds .* as UTF-8"):
            Probe(**fields)
    assert is_unicode("\U0001f600")
