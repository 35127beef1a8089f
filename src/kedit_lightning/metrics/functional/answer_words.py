"""Words of an answer, in the form in which answers are compared."""

from __future__ import annotations

import re
import string
import unicodedata
from typing import NamedTuple

from kedit_lightning.sentence import PLAIN_QUOTES

ARTICLES = frozenset({"a", "an", "the"})

_DASHES = str.maketrans("\u2010\u2011\u2013\u2212", "----")
_WIDE_STOPS = "\uff01\uff1f"
_MARKS = re.escape(string.punctuation)
# Blanks between words: runs of dots or hyphens, brackets, and marks that join no two digits.
_BETWEEN = re.compile(r"\.{2,}|-{2,}|[()\[\]{}\"|]|(?<!\d)[,;:/]|[,;:/](?!\d)")
# Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese stand without spaces. Each letter is
# a word there, with the marks that it carries; a number written in Chinese numerals is one word.
_UNSPACED = (
    "\u0e01-\u0e4f\u0e81-\u0ecf\u0edc-\u0edf\u0f40-\u0fbc\u1000-\u103f\u104a-\u109f\u1780-\u17d3"
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3035\u3041-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ef\uaa60-\uaa7f\uf900-\ufaff\U00020000-\U0003ffff"
)
_NUMERALS = "〇零一二三四五六七八九十百千万萬亿億两兩"
_COMBINING = (
    "\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u0f71-\u0f84"
    "\u0f90-\u0fbc\u102b-\u103e\u1056-\u1059\u17b4-\u17d3\u3099\u309a"
)
_PIECE = re.compile(rf"[{_NUMERALS}]+|[{_UNSPACED}][{_COMBINING}]*|(?:(?![{_UNSPACED}])\S)+")
# Marks before a word; a sign or symbol that stands before a digit belongs to the number.
_LEAD = re.compile(rf"[{_MARKS}]*?(?=(?:[-+$#<>=~]|[^\w\s{_MARKS}])*\.?\d)|[{_MARKS}]*")
_SUFFIX = re.compile(r"[#+%$]+")
_GRADE = re.compile(r"[^\W\d_]{1,2}")
# Marks within a word, unless they stand before a digit that follows no letter.
_INNER = re.compile(r"(?<=[^\W\d_])['.-]+(?=\w)|['.-]+(?=[^\W\d_])")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_OPERATOR = re.compile(r"[-+*/<>=]")


class Word(NamedTuple):
    """A word, the forms under which it is found, and the place where it begins."""

    text: str
    forms: tuple[str, ...]
    place: int


def plain_text(text: str) -> str:
    r"""Text in NFC with full-width forms, quotes and dashes as plain ones, without format marks.

    Wide sentence ends stay, as they end a sentence without a space after them.

    >>> plain_text("\uff23\uff0b\uff0b, \u22125"), len(plain_text("e\u0301"))
    ('C++, -5', 1)
    """
    text = re.sub(r"(?<=\d)\s+(?=%)", "", text)  # "10 %" is "10%"
    if text.isascii():
        return text
    kept = (letter for letter in text if unicodedata.category(letter) != "Cf")
    narrow = (
        unicodedata.normalize("NFKC", letter)
        if unicodedata.east_asian_width(letter) in "FH" and letter not in _WIDE_STOPS
        else letter
        for letter in kept
    )
    composed = unicodedata.normalize("NFC", "".join(narrow))
    return composed.translate(PLAIN_QUOTES).translate(_DASHES)


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())


def _clean(piece: str) -> tuple[str, ...]:
    """A word without the marks at its edges, and without a possessive ending where it has one."""
    body = piece[_LEAD.match(piece).end() :]  # type: ignore[union-attr]
    stem = body.rstrip(string.punctuation)
    tail = body[len(stem) :]
    suffix = _SUFFIX.match(tail)
    if suffix:
        stem += suffix.group()
    elif tail.startswith("-") and _GRADE.fullmatch(stem):  # the mark A-, the blood group O-
        stem += "-"
    forms = [stem, stem[:-2]] if stem.lower().endswith("'s") else [stem]
    bare = [_INNER.sub("", form) for form in forms]
    return tuple(
        _THOUSANDS.sub(lambda number: number.group().replace(",", ""), form).lower()
        for form in bare
        if form
    )


def answer_words(text: str) -> list[Word]:
    """Lowered words of plain text, without the marks at their edges.

    Marks between or before digits and symbols after a word count; a comma between thousands does
    not, nor do full stops, apostrophes and hyphens between letters.

    >>> [word.text for word in answer_words("(C++), 3,000 km or -3.5% of U.S. land.")]
    ['c++', '3000', 'km', 'or', '-3.5%', 'of', 'us', 'land']
    """
    loose = _BETWEEN.sub(_blank, text)
    loose = "".join(
        letter if letter.isascii() or unicodedata.category(letter)[0] != "P" else " "
        for letter in loose
    )
    pieces = [(piece.group(), piece.start()) for piece in _PIECE.finditer(loose)]
    words: list[Word] = []
    for index, (piece, place) in enumerate(pieces):
        forms = _clean(piece)
        between = 0 < index < len(pieces) - 1 and _OPERATOR.fullmatch(piece)
        if between and pieces[index - 1][0][-1].isdigit() and pieces[index + 1][0][0].isdigit():
            forms = (piece,)  # "1 + 1" is not "1 - 1"
        if forms:
            words.append(Word(forms[0], forms, place))
    return words
