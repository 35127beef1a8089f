"""The scratchpad of MeLLo: sub-questions, answers, retrieved facts and whether they contradict.

The controller is apart from any model: it is given a function that continues texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

#: A text and the strings before which its continuation ends -> the continuation and the string
#: that ended it, empty where none did.
Continue: TypeAlias = Callable[[str, Sequence[str]], tuple[str, str]]

SUBQUESTION, RETRIEVED = "Subquestion:", "Retrieved fact:"
FINAL, NEXT = "Final answer:", "\nQuestion:"
#: Examples of the scratchpad, in our own words and after the form of the paper's.
DEMONSTRATIONS = (
    """Question: What is the capital of the country where the author of The Trial was born?
Subquestion: Who is the author of The Trial?
Generated answer: The author of The Trial is Franz Kafka.
Retrieved fact: The author of The Trial is Jane Austen.
Retrieved fact contradicts generated answer, so the intermediate answer is: Jane Austen
Subquestion: In which country was Jane Austen born?
Generated answer: Jane Austen was born in England.
Retrieved fact: The author of The Castle is Mark Twain.
Retrieved fact does not contradict generated answer, so the intermediate answer is: England
Subquestion: What is the capital of England?
Generated answer: The capital of England is London.
Retrieved fact: The capital of Peru is Cusco.
Retrieved fact does not contradict generated answer, so the intermediate answer is: London
Final answer: London

""",
    """Question: On which continent is the company that makes the Corolla?
Subquestion: Which company makes the Corolla?
Generated answer: The company that makes the Corolla is Toyota.
Retrieved fact: The company that makes the Beetle is Volkswagen.
Retrieved fact does not contradict generated answer, so the intermediate answer is: Toyota
Subquestion: On which continent is Toyota?
Generated answer: Toyota is in Asia.
Retrieved fact: Toyota is in Europe.
Retrieved fact contradicts generated answer, so the intermediate answer is: Europe
Final answer: Europe

""",
    """Question: What is the official language of the country where volleyball began?
Subquestion: In which country did volleyball begin?
Generated answer: Volleyball began in the United States.
Retrieved fact: Volleyball began in Brazil.
Retrieved fact contradicts generated answer, so the intermediate answer is: Brazil
Subquestion: What is the official language of Brazil?
Generated answer: The official language of Brazil is Portuguese.
Retrieved fact: The official language of Chile is French.
Retrieved fact does not contradict generated answer, so the intermediate answer is: Portuguese
Final answer: Portuguese

""",
)


def subquestion_in(text: str) -> str | None:
    r"""The last sub-question that a text asks.

    >>> subquestion_in("Subquestion: Who?\nGenerated answer: Anna.\n")
    'Who?'
    """
    found = re.findall(r"^Subquestion:[ \t]*(\S.*)$", text, re.MULTILINE)
    return found[-1].strip() if found else None


def transcript(
    question: str,
    go_on: Continue,
    retrieve: Callable[[str], str] | None,
    hops: int,
    demonstrations: Sequence[str] = DEMONSTRATIONS,
    fits: Callable[[str], bool] = bool,
) -> str:
    """The scratchpad of a question, up to where its final answer follows.

    It ends early where the model asks no further sub-question, or begins another question.

    Args:
        question: The question.
        go_on: Continues a text up to one of some strings.
        retrieve: The stored sentence most similar to a sub-question; ``None`` for the plain chain
            of thought, in which the model writes the retrieved facts itself.
        hops: Most sub-questions.
        demonstrations: Text before the question; what stands in front is dropped as the scratchpad
            grows.
        fits: Whether a text leaves room for more.
    """

    def shown(text: str) -> str | None:
        """The text behind as many demonstrations as fit; ``None`` if it does not by itself."""
        wholes = ("".join(demonstrations[n:]) + text for n in range(len(demonstrations) + 1))
        return next(filter(fits, wholes), None)

    text = first = f"Question: {question}\n"
    stops = (FINAL, NEXT) if retrieve is None else (RETRIEVED, FINAL, NEXT)
    for _ in range(1 if retrieve is None else hops):
        new, stop = go_on(shown(text) or text, stops)
        asked = subquestion_in(new)
        if asked is not None or stop == FINAL:
            text = _with_line_break(text + new)
        if asked is None or stop != RETRIEVED or retrieve is None:
            break
        longer = f"{text}{RETRIEVED} {retrieve(asked)}\n"
        if shown(longer) is None:
            break
        text = longer
    else:
        if retrieve is not None:  # what follows from the last fact
            new, _ = go_on(shown(text) or text, (SUBQUESTION, FINAL, NEXT))
            text = _with_line_break(text + new)
    return shown(text + FINAL) or shown(first + FINAL) or first + FINAL


def _with_line_break(text: str) -> str:
    return f"{text.rstrip()}\n"
