"""Forms that one text can have in Unicode: composed or not, full width, with other spaces.

Two texts that a reader takes for one may differ in all of that, and in characters nobody sees.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

# Soft hyphen, zero-width space, word joiner, byte order mark.
_INVISIBLE = "\u00ad\u200b\u2060\ufeff"
_BLANK = "".join(filter(str.isspace, map(chr, range(0x3001)))) + _INVISIBLE
_BLANK_IN_LINES = _BLANK.replace("\r", "").replace("\n", "")
_PLAIN = str.maketrans(
    {
        **dict(zip("\u2018\u2019\u02bc\u201c\u201d", "'''\"\"", strict=True)),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        **dict.fromkeys(_INVISIBLE, ""),
    }
)
# Vowels and finals of Hangul that belong to the syllable before them.
_JOINING = ("\u1160", "\u11ff")
#: Characters that a message names as different.
_SHOWN = 3


class Piece(NamedTuple):
    """A character with the marks that combine with it."""

    start: int
    end: int
    plain: str  # what it is in every form of the text


def trimmed(text: str, keep_line_end: bool = False) -> str:
    r"""The text without white space and invisible characters at its edges.

    A line break at the end stays on request: of a prompt it is a part.

    >>> trimmed("\u200bLyon\u00a0\n"), trimmed(" A: \n", keep_line_end=True)
    ('Lyon', 'A: \n')
    """
    return text.lstrip(_BLANK).rstrip(_BLANK_IN_LINES if keep_line_end else _BLANK)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8, which half of a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def comparable(text: str) -> str:
    """The text as it is compared with others, whatever its form, case and white space."""
    if text.isascii():  # which most are, and which has one form
        return " ".join(text.casefold().split())
    return " ".join("".join(piece.plain for piece in _pieces(text)).casefold().split())


def spans_of(part: str, text: str) -> list[str]:
    r"""The different spans of a text that are the part in some form, in order.

    >>> spans_of("Cafe\u0301 A", "The caf\u00e9 Caf\u00e9\u00a0A")
    ['Café\xa0A']
    """
    wanted = "".join(piece.plain for piece in _pieces(part)).strip()
    form, starts, ends = "", {}, {}
    for piece in _pieces(text):
        if piece.plain:
            starts[len(form)] = piece.start
            form += piece.plain
            ends[len(form)] = piece.end
    found = []
    for match in re.finditer(f"(?={re.escape(wanted)})", form) if wanted else ():
        begin, stop = match.start(), match.start() + len(wanted)
        goes_on = _JOINING[0] <= form[stop : stop + 1] <= _JOINING[1]
        if begin in starts and stop in ends and not goes_on:
            found.append(text[starts[begin] : ends[stop]])
    return list(dict.fromkeys(found))


def differences(part: str, text: str) -> str:
    """Which characters tell a part from the place of a text that is most like it.

    Returns:
        A clause, or nothing where more than a third of the characters differ.

    >>> differences("eiffel", "The Eiffel Tower")
    "the prompt has 'Eiffel', with 'E' for 'e'"
    """
    wanted, pieces = list(_pieces(part)), list(_pieces(text))
    windows = [pieces[i : i + len(wanted)] for i in range(len(pieces) - len(wanted) + 1)]
    if not wanted or not windows:
        return ""

    def pairs(window: list[Piece]) -> list[tuple[str, str]]:
        both = zip(window, wanted, strict=True)
        texts = [(text[a.start : a.end], part[b.start : b.end]) for a, b in both]
        return list(dict.fromkeys((a, b) for a, b in texts if a != b))

    nearest = min(windows, key=lambda window: len(pairs(window)))
    differing = pairs(nearest)
    if len(differing) * 3 > len(wanted):
        return ""
    shown = [f"{_named(a, b)} for {_named(b, a)}" for a, b in differing[:_SHOWN]]
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    place = text[nearest[0].start : nearest[-1].end]
    return f"the prompt has {place!r}, with {', '.join(shown)}{more}"


def _named(text: str, other: str) -> str:
    if text.isascii() and other.isascii():
        return repr(text)
    return f"{text!r} ({' '.join(f'U+{ord(character):04X}' for character in text)})"


def _pieces(text: str) -> Iterator[Piece]:
    start, spaced = 0, False
    for at in range(1, len(text) + 1):
        if at < len(text) and unicodedata.combining(text[at]):
            continue
        plain = unicodedata.normalize("NFKD", text[start:at]).translate(_PLAIN)
        if plain.isspace():
            plain = "" if spaced else " "
        if plain:
            spaced = plain == " "
        yield Piece(start, at, plain)
        start = at
