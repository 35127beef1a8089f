"""Scores of free generations, which the model begins and ends on its own.

Nothing is cut at the answer's length, so a model that does not stop after the answer, or negates
it, does not score.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, TypeAlias

from kedit_lightning.metrics.functional.answer_words import (
    ARTICLES,
    Word,
    answer_words,
    plain_text,
)
from kedit_lightning.sentence import PLAIN_QUOTES, STOP, first_line, is_abbreviation

AnswerRule: TypeAlias = Literal["words", "squad"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NEGATIONS = re.compile(
    "no|not|never|none|neither|nor|cannot|cant|without|nobody|nothing|nowhere|.*n't", re.I
)
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def normalise_answer(text: str) -> str:
    """Lower the case, drop punctuation and articles, and join words by one space.

    Text that consists of nothing else is only lowered and stripped, so that it stays comparable.

    >>> normalise_answer("The  Eiffel Tower, Paris!")
    'eiffel tower paris'

    Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    bare = text.lower().translate(_PUNCTUATION)
    words = _ARTICLES.sub(" ", bare).split()
    return " ".join(words) if words else text.lower().strip()


def _without_articles(words: Sequence[Word], wanted: Sequence[Word]) -> list[Word]:
    # The last letter of "Serie A" is no article; it tells the answer from "Serie B".
    if wanted and wanted[-1].text in ARTICLES:
        return list(words)
    return [word for word in words if word.text not in ARTICLES]


def _normalised(text: str, rule: AnswerRule) -> str:
    if rule == "squad":
        return normalise_answer(text)
    words = answer_words(text)
    if ARTICLES.issuperset(word.text for word in words):  # nothing but articles or marks
        return text.lower().strip()
    return " ".join(word.text for word in _without_articles(words, words))


def generation_exact(text: str, answers: Sequence[str], rule: AnswerRule = "words") -> bool:
    """Whether a generation is one of the answers and then stops.

    The first line of ``text`` up to the end of a sentence must equal an answer. ``words`` compares
    the words of both (:func:`answer_words`, articles left out): marks that tell two numbers or
    names apart count. ``squad`` compares what :func:`normalise_answer` leaves, without any mark.
    Any full stop before a space may be that end, as answers may hold full stops; after an answer
    that ends in one the next word must not continue in lower case.

    >>> generation_exact(" Paris. It is", ["Paris"]), generation_exact("Paris is big", ["Paris"])
    (True, False)
    >>> generation_exact("3.5", ["35"]), generation_exact("3.5", ["35"], rule="squad")
    (False, True)
    >>> generation_exact("Washington D.C. is the capital.", ["Washington D.C."])
    False
    """
    line, answers = _comparable(text, answers, rule)
    stops = list(STOP.finditer(line))
    for answer in answers:
        wanted = _normalised(answer, rule)
        for stop in stops:
            rest = line[stop.end() :].lstrip()
            within = stop.group() == "." and answer.rstrip().endswith(".") and rest[:1].islower()
            if not within and _normalised(line[: stop.start()], rule) == wanted:
                return True
        if _normalised(line, rule) == wanted:
            return True
    return False


def _comparable(text: str, answers: Sequence[str], rule: AnswerRule) -> tuple[str, Sequence[str]]:
    """The first line of a generation and the answers, as plain text where the rule asks for it."""
    if rule == "squad":
        return first_line(text), answers
    return plain_text(first_line(text)), [plain_text(answer) for answer in answers]


def _squad_words(line: str) -> list[Word]:
    """Lowered words of a line without any punctuation."""
    # Blanks of equal length keep the places: possessive endings, and marks between words.
    loose = re.sub(r"'s\b", "  ", line.translate(PLAIN_QUOTES))
    loose = re.sub(r"(?<!\d)[,;:/](?!\d)|[()\[\]]", " ", loose)
    words = [(chunk.group(), chunk.start()) for chunk in re.finditer(r"\S+", loose)]
    bare = [(word.lower().translate(_PUNCTUATION), place) for word, place in words]
    return [Word(word, (word,), place) for word, place in bare if word]


def _negates(word: str) -> bool:
    if word.lower() == "no,":
        return False  # "No, it is in Rome" rejects the question, not what follows
    bare = word.translate(PLAIN_QUOTES).strip(string.punctuation)
    return _NEGATIONS.fullmatch(bare) is not None


def generation_contains(text: str, answers: Sequence[str], rule: AnswerRule = "words") -> bool:
    """Whether the first sentence of a generation states one of the answers.

    The answer must stand in it as whole words, compared by the rule of :func:`generation_exact`
    (an article at its very end is kept: "Serie A" is not "Serie B"), with no English negation (no,
    not, never, n't, …) before it. "No, it is Rome" states Rome. This is a test on words: "not only
    in Rome" does not count, and irony does. In scripts without spaces every letter is a word. An
    exact answer is always contained, except by the rule ``squad``.

    >>> generation_contains("It is in the city of Rome, Italy.", ["Rome"])
    True
    >>> generation_contains("It isn't in Rome.", ["Rome"])
    False
    >>> generation_contains("Romeo wrote it. Rome is a city.", ["Rome"])
    False
    >>> generation_contains("法国的首都是巴黎。", ["巴黎"])
    True
    """
    if rule == "words" and generation_exact(text, answers):
        return True
    line, comparable = _comparable(text, answers, rule)
    words_of = _squad_words if rule == "squad" else answer_words
    every = words_of(line)
    ends = [stop.end() for stop in STOP.finditer(line) if not is_abbreviation(line, stop)]
    for answer in comparable:
        asked = words_of(answer)
        if ARTICLES.issuperset(word.text for word in asked):  # nothing but articles or marks
            if generation_exact(text, [answer], rule):
                return True
            continue
        wanted, words = _without_articles(asked, asked), _without_articles(every, asked)
        for first in range(len(words) - len(wanted) + 1):
            place = words[first].place
            if ends and ends[0] <= place:
                break
            pairs = zip(words[first:], wanted, strict=False)
            if all(want.text in word.forms for word, want in pairs) and not any(
                _negates(word) for word in line[:place].split()
            ):
                return True
    return False


def generation_f1(text: str, answers: Sequence[str], rule: AnswerRule = "words") -> float:
    """Best F1 of words between the first sentence of a generation and an answer.

    Words are those of :func:`generation_exact`, articles left out. Without a common word it is 0.

    >>> round(generation_f1("It is the Eiffel Tower. It", ["Eiffel Tower"]), 3)
    0.667

    Source: the evaluation script of SQuAD 1.1 (Rajpurkar et al. 2016, arXiv 1606.05250).
    """
    line, comparable = _comparable(text, answers, rule)
    stops = [stop for stop in STOP.finditer(line) if not is_abbreviation(line, stop)]
    said = Counter(_normalised(line[: stops[0].start()] if stops else line, rule).split())
    best = 0.0
    for answer in comparable:
        wanted = Counter(_normalised(answer, rule).split())
        shared = sum((said & wanted).values())
        if shared:
            best = max(best, 2 * shared / (said.total() + wanted.total()))
    return best


def runs_on(text: str, answers: Sequence[str], rule: AnswerRule = "words") -> bool:
    """Whether a generation begins with an answer, as whole words, and does not stop behind it.

    >>> runs_on("Rome and Milan", ["Rome"]), runs_on("Rome.", ["Rome"]), runs_on("Romeo", ["Rome"])
    (True, False, False)
    """
    if generation_exact(text, answers, rule):
        return False
    line, comparable = _comparable(text, answers, rule)
    words_of = _squad_words if rule == "squad" else answer_words
    every = words_of(line)
    for answer in comparable:
        asked = words_of(answer)
        wanted, words = _without_articles(asked, asked), _without_articles(every, asked)
        pairs = list(zip(words, wanted, strict=False))
        if wanted and len(pairs) == len(wanted) and all(w.text in word.forms for word, w in pairs):
            return True
    return False


def _grams(text: str, n: int) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.translate(PLAIN_QUOTES))
    return Counter(zip(*(words[shift:] for shift in range(n)), strict=False))


def repetition_rate(text: str, n: int = 3) -> float:
    """Share of n-grams that the text has already used before.

    Words and punctuation marks both count. Text of fewer than ``n`` words gives 0.

    >>> repetition_rate("in Rome in Rome in Rome", n=2)
    0.6
    """
    counts = _grams(text, n)
    total = sum(counts.values())
    return 1.0 - len(counts) / total if total else 0.0


def ngram_entropy(text: str) -> float:
    """Fluency: weighted entropy of the bigrams and trigrams of a text, in bits.

    The mean of 2/3 times the bigram and 4/3 times the trigram entropy. Repetitive text scores low.
    Words are split by a rule (a word with its apostrophes, or one mark), not by nltk's tokenizer,
    so values differ slightly from published ones. Compare texts of equal length only.

    >>> round(ngram_entropy("the tower stands in the city of Rome"), 4)
    2.6591

    Source: Zhang et al. 2018 (arXiv 1809.05972), with the weights of Meng et al. 2022
    (arXiv 2202.05262).
    """
    entropy = 0.0
    for n, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = _grams(text, n)
        total = sum(counts.values())
        bits = sum(count / total * math.log2(total / count) for count in counts.values())
        entropy += weight * bits / 2
    return entropy


def mean_ngram_entropy(texts: Iterable[str]) -> float:
    """Mean of :func:`ngram_entropy` over texts, NaN without texts.

    >>> mean_ngram_entropy(["a b c", "a a a"])  # entropies 1/3 and 0
    0.16666666666666666
    """
    values = [ngram_entropy(text) for text in texts]
    return sum(values) / len(values) if values else math.nan
