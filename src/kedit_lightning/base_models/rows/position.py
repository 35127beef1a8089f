"""Where things stand: a subject in its prompt, each token in its row."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from torch import Tensor

#: Scripts that put no space between words: Thai and Lao, Burmese, Khmer, kana and Han with their
#: punctuation, and full-width forms.
_UNSPACED = (
    ("\u0e00", "\u0eff"),
    ("\u1000", "\u109f"),
    ("\u1780", "\u17ff"),
    ("\u3000", "\u312f"),
    ("\u31f0", "\u9fff"),
    ("\uf900", "\ufaff"),
    ("\uff00", "\uff9f"),
    ("\U00020000", "\U0003ffff"),
)


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that puts no space between words."""
    return any(start <= character <= end for start, end in _UNSPACED)


def ends_open(text: str) -> bool:
    r"""Whether a text ends where a word follows without a space.

    That is behind white space and behind an opener: a bracket, an inverted mark, or a quotation
    mark in front of which a word would begin. ``“`` opens in English and closes in German.

    >>> [ends_open(text) for text in ("A:\n", "He said (", 'He said "', 'He said "No"')]
    [True, True, True, False]
    """
    if not text:
        return False
    last, before = text[-1], text[:-1]
    if last.isspace() or last in "¿¡" or unicodedata.category(last) == "Ps":
        return True
    quotes = last in "\"'`" or unicodedata.category(last) in ("Pi", "Pf")
    led_in = not before or before[-1] in ":=" or unicodedata.category(before[-1]) == "Pd"
    return quotes and (led_in or ends_open(before))


def last_place(text: str, part: str) -> int:
    """Index of the last occurrence of a part in a text, preferably as a whole word, or ``-1``.

    >>> last_place("Art is shown in Arthur's hall", "Art"), last_place("Kraków", "Kra")
    (0, 0)
    """

    def touches(left: str, right: str) -> bool:
        return all(c.isalnum() and not is_unspaced(c) for c in (left, right))

    places = [match.start() for match in re.finditer(f"(?={re.escape(part)})", text)]
    padded = f" {text} "
    whole = [
        at
        for at in places
        if not touches(padded[at], part[0]) and not touches(part[-1], padded[at + len(part) + 1])
    ]
    return (whole or places or [-1])[-1]


def shared_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the longest common prefix of two sequences of ids."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def token_span(offsets: Sequence[tuple[int, int]], begin: int, end: int) -> tuple[int, int]:
    """First and last token that hold one of the characters ``begin`` to ``end - 1`` of a text.

    ``offsets`` are the characters of each token, as fast tokenizers give them.
    """
    tokens = [(i, *pair) for i, pair in enumerate(offsets) if pair[0] < pair[1]]
    last = max(i for i, start, _ in tokens if start < end)
    return next((i for i, _, stop in tokens if stop > begin), last), last


def positions(mask: Tensor) -> Tensor:
    """Position ids from the attention mask, ``[batch, tokens]`` each; 0 on padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)
