"""How near a free generation comes to a passage, and what it mentions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics.functional.text import bleu_score, rouge_score

from kedit_lightning.metrics.functional.answer_words import answer_words, plain_text

#: What texts are made of: words, or characters where a language has no spaces.
Unit: TypeAlias = Literal["words", "characters"]


def units(text: str, unit: Unit = "words") -> list[str]:
    """The words of a text, or its letters and digits, in lower case and without marks.

    >>> units("The C++ book, again."), units("天下归仁焉。", "characters")
    (['the', 'c++', 'book', 'again'], ['天', '下', '归', '仁', '焉'])
    """
    if unit == "words":
        return [word.text for word in answer_words(plain_text(text))]
    return [letter for letter in plain_text(text).lower() if letter.isalnum()]


def passage_bleu(text: str, answers: Sequence[str], unit: Unit = "words") -> float:
    """BLEU of a text, with the answers as references.

    N-grams are of up to four units, fewer where the text or all answers are shorter. Without one
    n-gram in common it is 0.

    >>> passage_bleu("She keeps bees.", ["she keeps bees"])
    1.0
    >>> round(passage_bleu("she keeps bees in Hask", ["she keeps bees in town"]), 4)
    0.6687

    That is the fourth root of 4/5 3/4 2/3 1/2.

    Source: Papineni et al. 2002, by torchmetrics.
    """
    said, wanted = units(text, unit), [units(answer, unit) for answer in answers]
    n = min(4, len(said), max(map(len, wanted), default=0))
    if n == 0:
        return 0.0
    references = [" ".join(words) for words in wanted]
    return float(bleu_score([" ".join(said)], [references], n_gram=n))


def passage_rouge(
    text: str,
    answers: Sequence[str],
    key: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
    part: Literal["recall", "precision", "fmeasure"] = "fmeasure",
    unit: Unit = "words",
) -> float:
    """ROUGE of a text, of the answer for which it is largest.

    ``rouge1`` and ``rouge2`` count common words and pairs of words, ``rougeL`` the longest common
    subsequence. ``recall`` is the share of the answer's that the text has, ``precision`` the share
    of the text's that the answer has, ``fmeasure`` their harmonic mean.

    >>> round(passage_rouge("she keeps bees", ["She keeps black bees."], "rougeL", "recall"), 3)
    0.75
    >>> round(passage_rouge("仁归天下", ["天下归仁焉。"], "rougeL", "recall", "characters"), 3)
    0.4

    Source: Lin 2004, by torchmetrics.
    """
    said = units(text, unit)
    scores = []
    for answer in answers:
        wanted = units(answer, unit)
        if said and wanted:
            # Its own splitting knows English letters alone.
            texts = " ".join(said), " ".join(wanted)
            found = rouge_score(*texts, rouge_keys=key, normalizer=str, tokenizer=str.split)
            scores.append(float(found[f"{key}_{part}"]))
    return max(scores, default=0.0)


def mentions(text: str, answers: Sequence[str]) -> bool:
    """Whether whole words of an answer stand anywhere in a text, whatever stands around them.

    >>> mentions("Not Rome, they say. Perhaps Milan.", ["Milan"]), mentions("Romeo", ["Rome"])
    (True, False)
    """
    words = answer_words(plain_text(text))
    for answer in answers:
        wanted = [word.text for word in answer_words(plain_text(answer))]
        for first in range(len(words) - len(wanted) + 1):
            pairs = zip(words[first:], wanted, strict=False)
            if wanted and all(want in word.forms for word, want in pairs):
                return True
    return False


def edit_success(new: float, old: float, new_before: float) -> float:
    """Success of an edited opinion: how much likelier it is than the other, and still on topic.

    ``sigmoid(new - old) * min(1, exp(new - new_before))`` of mean log-probabilities: of the
    wished answers, of the others, and of the wished answers before the edit.

    >>> edit_success(-1.0, -1.0, -2.0), round(edit_success(-3.0, -9.0, -2.0), 4)
    (0.5, 0.367)

    Source: Mitchell et al. 2022 (SERAC, arXiv 2206.06520).
    """
    ahead = new - old
    likelier = math.exp(min(0.0, ahead)) / (1.0 + math.exp(-abs(ahead)))  # the sigmoid
    return likelier * math.exp(min(0.0, new - new_before))


def nearest_cosine(text: Tensor, answers: Tensor) -> float:
    """Largest cosine of an embedding ``[dimension]`` with those of ``[answers, dimension]``.

    >>> round(nearest_cosine(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])), 4)
    0.7071
    """
    return float(torch.cosine_similarity(text[None].float(), answers.float()).max())
