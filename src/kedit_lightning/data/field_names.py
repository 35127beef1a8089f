"""Names that other formats have for the fields of ``Requests``, and names that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: What other formats call a field of ours.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "src", "text", "update", "input", "instruction"),
    "target_new": (
        *("target", "alt", "object", "labels", "answer", "answers", "ans", "new_answer"),
        *("output", "attribute", "obj_label", "safe generation"),
    ),
    "subject": ("ent", "entity", "concept", "sub_label"),
    "target_old": ("ground_truth", "target_true", "prediction", "answer_true", "unsafe generation"),
    "rephrases": (
        *("rephrase", "rephrase_prompt", "rephrase_prompts", "paraphrase", "paraphrases"),
        *("paraphrase_prompts", "para_question", "phrase_prompt", "paraphrased_question"),
    ),
    "id": ("case_id", "known_id", "uuid", "pid"),
    "task": ("relation", "relation_id", "pred", "type"),
    "locality": ("loc", "locality_prompt", "neighborhood_prompts", "locality_question"),
    "portability": ("questions", "mhop", "portability_prompt"),
    "answers": ("answer", "ground_truth", "target", "loc_ans"),
}


def ours(name: str) -> str | None:
    """The field of ``Requests`` that another format calls so."""
    return next((field for field, names in SYNONYMS.items() if name in names), None)


def misspelt(name: str, known: Iterable[str]) -> str | None:
    """The known name that one is nearly spelt like."""
    spelt = {str(other).casefold(): str(other) for other in known}
    found = difflib.get_close_matches(name.casefold(), sorted(spelt), 1, 0.75)
    return spelt[found[0]] if found else None


def meant(name: str, known: Iterable[str], form: str = "; was {} meant?") -> str:
    """A clause with the known name that another may stand for, by meaning or spelling, or nothing.

    >>> meant("ground_truth", ["prompt", "answers"]), meant("promt", ["prompt", "answers"])
    ("; was 'answers' meant?", "; was 'prompt' meant?")
    """
    known = sorted(map(str, known))
    alike = (o for o in known if name in SYNONYMS.get(o, ()) or o in SYNONYMS.get(name, ()))
    found = next(alike, None) or misspelt(name, known)
    return "" if found is None else form.format(f"'{found}'")
