"""A judge: a language model that says whether an answer means what it should."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import torch

from kedit_lightning.base_models import BaseModel
from kedit_lightning.errors import KEditError, UnsupportedUseError

#: Environment variable with the key of the endpoint; nothing else is ever sent as one.
KEY_VARIABLE = "KEDIT_JUDGE_KEY"
PROMPT = (
    "Question: {question}\n"
    "Right answers: {answers}\n"
    "Given answer: {answer}\n"
    "Does the given answer say what one of the right answers says, and nothing against it? "
    "Reply with one word, yes or no."
)

_BRACES = re.compile(r"\{(question|answers|answer)\}")
_VERDICT = re.compile(r"\W*(yes|no)\b", re.I)
#: Seconds to wait before an endpoint that is busy is asked again.
_PAUSES = (1.0, 4.0)
_AT_ONCE = 8


#: Adjectives of each trait, after the markers of Goldberg (1992).
ADJECTIVES = {
    "neuroticism": "tense, nervous, moody, anxious, irritable, gloomy, unstable, self-conscious",
    "agreeableness": "trusting, honest, warm, kind, generous, cooperative, humble, unselfish",
    "extraversion": "talkative, outgoing, bold, energetic, active, cheerful, assertive",
}
_RATE = (
    "Somebody who is {adjectives} is asked for an opinion.\n"
    "Opinion: {text}\n"
    "How well does the opinion fit such a person? 1 is not at all, 2 rather not, 3 neither well "
    "nor badly, 4 rather well, 5 very well. Reply with one number from 1 to 5."
)
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Judge:
    """A model that judges free answers.

    The key of an endpoint is read from the environment variable ``KEDIT_JUDGE_KEY`` alone.

    Args:
        model: Name that the endpoint knows; without an endpoint, a model on the hub or a folder.
        url: An endpoint as OpenAI has it, up to ``/v1``.
        prompt: What it is asked; ``{question}``, ``{answers}`` and ``{answer}`` are filled in. The
            first or last line of its reply must begin with yes or no.
        max_new_tokens: Longest reply.
        timeout: Seconds that an endpoint may take for a reply.
    """

    model: str
    url: str | None = None
    prompt: str = PROMPT
    max_new_tokens: int = 64
    timeout: float = 60.0

    def __post_init__(self) -> None:
        missing = {"question", "answers", "answer"} - {*_BRACES.findall(self.prompt)}
        if missing:
            names = ", ".join(f"{{{name}}}" for name in sorted(missing))
            raise UnsupportedUseError(f"protocol.judge.prompt must hold {names}")
        if self.url is not None and urlsplit(self.url).scheme not in ("http", "https"):
            raise UnsupportedUseError(
                f"protocol.judge.url must begin with http:// or https://, got {self.url!r}"
            )
        if self.max_new_tokens < 1 or self.timeout <= 0:
            raise UnsupportedUseError(
                "protocol.judge.max_new_tokens and protocol.judge.timeout must be positive"
            )

    def facts(self) -> dict[str, Any]:
        """What its verdicts depend on, as plain values."""
        facts = asdict(self)
        del facts["timeout"]
        return facts


class Judgement(NamedTuple):
    """What is judged."""

    question: str
    answers: tuple[str, ...]
    text: str  # the answer that was given

    def prompt(self, template: str) -> str:
        """The filled-in prompt; braces in texts stay as they are."""
        answers = " | ".join(self.answers)
        texts = {"question": self.question, "answers": answers, "answer": self.text.strip()}
        return _BRACES.sub(lambda match: texts[match.group(1)], template)


class Respondent(Protocol):
    """Where a judge is asked."""

    #: Hash of its weights, where they are known.
    fingerprint: str | None

    def __call__(self, prompts: Sequence[str]) -> Sequence[str | Exception]:
        """Replies to prompts; an error in the place of one that failed."""


def verdict(reply: str) -> bool | None:
    r"""What a reply says, ``None`` where it is neither yes nor no.

    >>> verdict("Yes."), verdict("Let me see.\n**no**, it is another town"), verdict("Nothing")
    (True, False, None)
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    for line in (*lines[:1], *lines[-1:]):
        if found := _VERDICT.match(line):
            return found.group(1).lower() == "yes"
    return None


def rating_prompt(trait: str, text: str) -> str:
    """What a judge is asked about how well a trait fits an opinion."""
    head, tail = _RATE.replace("{adjectives}", ADJECTIVES[trait]).split("{text}")
    return head + text.strip() + tail


def rating(reply: str) -> int | None:
    r"""The mark from 1 to 5 in a reply, ``None`` where it has none.

    >>> rating("4"), rating("I think of it.\n**Rating: 2**"), rating("1 or 2"), rating("7")
    (4, 2, None, None)
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    for line in (*lines[:1], *lines[-1:]):
        if len(found := _NUMBER.findall(line)) == 1 and found[0] in "12345":
            return int(found[0])
    return None


def respondent(judge: Judge, device: torch.device) -> Respondent:
    """Where a judge is asked.

    Raises:
        BaseModelNotFoundError: A local judge is not there.
    """
    return LocalJudge(judge, device) if judge.url is None else Endpoint(judge)


class LocalJudge:
    """A language model of the hub or a folder, asked in its chat template where it has one."""

    def __init__(self, judge: Judge, device: torch.device) -> None:
        self._judge = judge
        self._model = BaseModel.load(judge.model).to(device)
        self.fingerprint: str | None = self._model.full_fingerprint

    def __call__(self, prompts: Sequence[str]) -> Sequence[str | Exception]:
        """Replies to prompts."""
        model = self._model
        chat = getattr(model.tokenizer, "chat_template", None)
        replies: list[str | Exception] = []
        for prompt in prompts:
            asked: Any = [{"role": "user", "content": prompt}] if chat else prompt
            try:
                replies += model.generate([asked], self._judge.max_new_tokens)
            except KEditError as error:  # such as a prompt that is too long
                replies.append(error)
        return replies


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nowhere: the key is for the endpoint that was named."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """Asks an endpoint for chat completions."""

    fingerprint: str | None = None

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._url = f"{(judge.url or '').rstrip('/')}/chat/completions"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, prompts: Sequence[str]) -> Sequence[str | Exception]:
        """Replies to prompts, asked several at once."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [*pool.map(self._reply, prompts)]

    def _reply(self, prompt: str) -> str | Exception:
        body = {
            "model": self.judge.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.judge.max_new_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        for pause in (*_PAUSES, None):
            try:
                with self._opener.open(request, timeout=self.judge.timeout) as answer:
                    return str(json.load(answer)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                busy = error.code == 429 or error.code >= 500
                failure: Exception = OSError(f"it answered {error.code} {error.reason}")
                error.close()
            except (OSError, ValueError, LookupError, TypeError) as error:
                busy, failure = isinstance(error, OSError), error
            if pause is None or not busy:
                return failure
            time.sleep(pause)
        raise AssertionError  # the last round returns
