"""Sentences of generated text."""

import re

# A sentence ends at . ! or ? (with closing quotes) before a space or the end, or at a wide stop.
STOP = re.compile(r"""[.!?]+["'\u201d\u2019)\]]*(?=\s|$)|[\u3002\uff01\uff1f]""")
# Words whose full stop belongs to them; those of the second set may also end a sentence.
_TITLES = re.compile("st|mt|ft|mr|mrs|ms|dr|prof|rev|gov|gen|col|capt|lt|sgt|sen|vs", re.I)
_TAILS = re.compile("jr|sr|inc|ltd|co|corp|etc", re.I)
_INITIALS = re.compile(r"(?:[^\W\d]\.)*[^\W\d]")
# Typographic apostrophes and double quotes, as the plain ones that the rules know.
PLAIN_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def first_line(text: str) -> str:
    """The first line that is not empty."""
    stripped = text.strip()
    return stripped.splitlines()[0].rstrip() if stripped else ""


def is_abbreviation(line: str, stop: re.Match[str]) -> bool:
    """Whether the full stop belongs to a word: "St.", "J.", "D.C." before more text."""
    if stop.group() != "." or stop.end() == len(line):
        return False
    before = line[: stop.start()].translate(PLAIN_QUOTES).split()
    last = before[-1].lstrip("\"'([") if before else ""
    goes_on = line[stop.end() :].lstrip()[:1].islower()
    return bool(
        _INITIALS.fullmatch(last) or _TITLES.fullmatch(last) or (goes_on and _TAILS.fullmatch(last))
    )


def answer_text(text: str) -> str:
    r"""The part of a generation that is the answer: the first sentence of its first line.

    Full stops of initials and common abbreviations do not end it.

    >>> answer_text(" Rome. It is the capital.\nQ: next")
    'Rome'
    >>> answer_text("in St. Petersburg, Russia. The city")
    'in St. Petersburg, Russia'
    """
    line = first_line(text)
    for stop in STOP.finditer(line):
        if not is_abbreviation(line, stop):
            return line[: stop.start()].rstrip()
    return line
