"""Prompts that an edit has nothing to do with, against which memories learn to stay silent."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.errors import DataFileError
from kedit_lightning.methods.shared.random_numbers import request_generator
from kedit_lightning.requests import EditRequest
from kedit_lightning.statistics import few_sample_texts

#: Words of an opening of a text, fewest and most.
_WORDS = (4, 10)
#: Tokens of a subject that the model is asked for.
_TOKENS = 8


def read_prompts(path: str) -> list[str]:
    """The prompts of a file, one a line.

    Raises:
        DataFileError: There is no such file, or it holds no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"irrelevant prompts cannot be read from {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataFileError(f"{path} holds no irrelevant prompts; put one on each line")
    return prompts


def subject_in(continuation: str, suffix: str) -> str:
    """The subject that a continuation starts with: what stands before the rest of the prompt.

    >>> subject_in(" Ray Emery is ice hockey", " is")
    'Ray Emery'
    >>> subject_in(" Ray Emery. He", "")
    'Ray Emery'
    """
    word = next(iter(suffix.split()), None)
    found = continuation.partition(f" {word}")[0] if word else continuation
    found = found.partition(".")[0] if found == continuation else found
    return " ".join(found.split()[:4])


def openings(count: int, seed: int | str) -> list[str]:
    """First words of random paragraphs of the packaged text."""
    chance = random.Random(seed)
    texts = chance.choices(few_sample_texts(), k=count)
    return [" ".join(text.split()[: chance.randint(*_WORDS)]) for text in texts]


class Background:
    """Irrelevant prompts of requests.

    Half are the request's own prompt about subjects that the unedited model itself names where the
    subject stands, and half openings of the packaged text; or all are from a file.  They depend on
    the model, the seed and the request alone.

    Args:
        base: The base model.
        seed: Seed of all choices.
        path: File of prompts to choose from instead, one a line.
        samples: How often the model is asked for another subject.
    """

    def __init__(
        self, base: BaseModel, seed: int, path: str | None = None, samples: int = 8
    ) -> None:
        self._base, self._seed, self._samples = base, seed, samples
        self._given = None if path is None else read_prompts(path)
        self._named: dict[tuple[str, str], list[str]] = {}

    def of(self, requests: Sequence[EditRequest], count: int) -> list[list[str]]:
        """So many prompts for each request, none of them a prompt of any."""
        asked = {request.prompt for request in requests}
        found = []
        for request in requests:
            chance = random.Random(f"{self._seed} {request.prompt} {request.target_new}")
            chosen = self._given or self._others(request)
            kept = [prompt for prompt in chosen if prompt not in asked]
            wanted = count if self._given else count // 2
            kept = chance.sample(kept, min(wanted, len(kept)))
            kept += openings(count - len(kept), chance.randrange(2**32))
            found.append([self._fitting(prompt, request.target_new) for prompt in kept])
        return found

    def _fitting(self, prompt: str, answer: str) -> str:
        """The first words of a prompt that leave room for an answer in the model's window."""
        encoder, words = self._base.encoder, prompt.split(" ")
        room = self._base.max_tokens - encoder.count(answer) - 2
        while len(words) > 1 and encoder.count_prompt(" ".join(words)) > room:
            words.pop()
        return " ".join(words)

    def _others(self, request: EditRequest) -> list[str]:
        """The prompt about other subjects; none where the model cannot name any."""
        prefix, found, suffix = request.prompt.partition(request.subject or request.prompt)
        if not (request.subject and found and prefix.strip()):
            return []
        key = (prefix.strip(), suffix)
        if key not in self._named:
            self._named[key] = self._subjects(*key)
        names = [name for name in self._named[key] if name not in request.subject]
        return [f"{prefix}{name}{suffix}" for name in names]

    def _subjects(self, prefix: str, suffix: str) -> list[str]:
        base, blank = self._base, EditRequest(prefix, suffix.strip() or "-")
        devices = [base.device] if base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), base.edits.suspended():
            torch.manual_seed(request_generator(self._seed, [blank], "subjects").initial_seed())
            texts = base.generate([prefix] * self._samples, _TOKENS, do_sample=True, top_k=0)
        names = [subject_in(text, suffix) for text in texts]
        return [name for name in dict.fromkeys(names) if name]
