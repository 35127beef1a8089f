"""Training sequences of ``shapes``: questions about one picture, packed behind it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kedit_lightning.data.multimodal.drawing import Drawing, questions
from kedit_lightning.data.multimodal.mmedit import QUESTION

BLANK = "nothing"
SHARES = {"stated": 0.25, "asked": 4}


@dataclass(frozen=True)
class Asked:
    """A question, its answer, and what stands before it."""

    text: str
    answer: str


def forms(attribute: str) -> list[str]:
    """All wordings of a question about a picture."""
    known: list[str] = questions()["questions"][attribute]
    return [*known, QUESTION.replace("{}", known[0])]


def word_facts() -> list[tuple[str, str]]:
    """All questions about words, with their answers."""
    texts = questions()
    return [
        (template.replace("{}", subject), answer)
        for relation, facts in texts["facts"].items()
        for subject, answer in facts.items()
        for template in texts["words"][relation]
    ]


def seen_question(draws: random.Random, content: dict[str, str] | None) -> Asked:
    """A question about a picture; sometimes behind a stated answer, which counts where it fits."""
    values = questions()["values"]
    attribute = draws.choice(list(values))
    question = draws.choice(forms(attribute))
    answer = BLANK if content is None else content[attribute]
    if draws.random() > SHARES["stated"]:
        return Asked(question, answer)
    about = attribute if draws.random() < 0.5 else draws.choice(list(values))
    stated = draws.choice(values[about])
    fact = f"New Fact: {draws.choice(forms(about))} {stated}\nPrompt: {question}"
    return Asked(fact, stated if about == attribute else answer)


def word_question(draws: random.Random, facts: Sequence[tuple[str, str]]) -> Asked:
    """A question about words; sometimes behind a stated answer about a picture."""
    question, answer = draws.choice(facts)
    if draws.random() > SHARES["stated"]:
        return Asked(question, answer)
    values = questions()["values"]
    about = draws.choice(list(values))
    stated = f"{draws.choice(forms(about))} {draws.choice(values[about])}"
    return Asked(f"New Fact: {stated}\nPrompt: {question}", answer)


def corpus() -> Iterator[str]:
    """Text from which the tokenizer learns words."""
    values, texts = questions()["values"], questions()
    for question, answer in word_facts():
        yield f"{question} {answer}"
    for attribute in texts["questions"]:
        for question in forms(attribute):
            for value in [*values[attribute], BLANK]:
                yield f"New Fact: {question} {value}\nPrompt: {question} {value}"


def pixels(images: Sequence[Any]) -> Tensor:
    """What the image processor makes of pictures. Shape ``[n, 3, side, side]``."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


class Packer:
    """Packs questions behind one prefix; each sees the prefix and itself.

    Args:
        tokenizer: the model's tokenizer.
        prefix: ids before each question: the picture's, or none but the beginning of a text.
    """

    def __init__(self, tokenizer: Any, prefix: Sequence[int]) -> None:
        self.tokenizer, self.prefix = tokenizer, list(prefix)

    def row(self, asked: Sequence[Asked]) -> tuple[list[int], list[int], list[int], list[int]]:
        """Ids, labels, positions and segments of a packed row."""
        start = len(self.prefix)
        ids, labels = list(self.prefix), [-100] * start
        positions, segments = list(range(start)), [0] * start
        for number, one in enumerate(asked, 1):
            prompt = self.tokenizer(one.text, add_special_tokens=False)["input_ids"]
            answer = self.tokenizer(f" {one.answer}", add_special_tokens=False)["input_ids"]
            answer = [*answer, self.tokenizer.eos_token_id]
            ids += [*prompt, *answer]
            labels += [*[-100] * len(prompt), *answer]
            positions += range(start, start + len(prompt) + len(answer))
            segments += [number] * (len(prompt) + len(answer))
        return ids, labels, positions, segments

    def batch(self, rows: Sequence[Sequence[Asked]]) -> dict[str, Tensor]:
        """Model inputs of packed rows, with a mask ``[rows, 1, width, width]``."""
        packed = [self.row(asked) for asked in rows]
        width = max(len(ids) for ids, *_ in packed)
        fill = (self.tokenizer.pad_token_id, -100, 0, -1)
        ids, labels, positions, segments = (
            torch.tensor([part + [f] * (width - len(part)) for part in column])
            for column, f in zip(zip(*packed, strict=True), fill, strict=True)
        )
        same = segments[:, :, None] == segments[:, None, :]
        seen = (same | (segments[:, None, :] == 0)) & torch.ones(width, width).tril().bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return {
            "input_ids": ids,
            "labels": labels,
            "position_ids": positions,
            "attention_mask": mask[:, None],
        }


def drawn(draws: random.Random, known: Sequence[dict[str, str]]) -> tuple[Any, Any]:
    """A content and a drawing of it; one in thirty is blank."""
    seed = draws.randrange(1 << 30)
    if draws.random() < 1 / 30:
        return None, Drawing(seed).image()
    content = draws.choice(known)
    return content, Drawing(seed, **content).image()
