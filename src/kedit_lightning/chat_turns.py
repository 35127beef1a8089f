"""Prompts given as messages: turns of a chat, which the tokenizer's template puts into words.

Everywhere a prompt is one text. That of messages is their JSON, ``[{"role": "user", "content":
"…"}]``, in one spelling, so that hashes, files and tables need not know of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias, cast

from kedit_lightning.errors import InvalidRequestError

#: A turn: ``{"role": "user", "content": "Where is Lyon?"}``.
Message: TypeAlias = Mapping[str, str]

_FIELDS = {"role", "content"}


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) == _FIELDS
        and all(isinstance(text, str) and text.strip() for text in value.values())
    )


def prompt_text(prompt: str | Sequence[Message]) -> str:
    """The one text of a prompt: itself, or the JSON of its messages.

    >>> prompt_text([{"content": "Where is Lyon?", "role": "user"}])
    '[{"role": "user", "content": "Where is Lyon?"}]'

    Raises:
        InvalidRequestError: The messages are not a list of roles with contents.
    """
    if isinstance(prompt, str):
        found = messages_in(prompt)
        return prompt if found is None else _json(found)
    if not isinstance(prompt, Sequence) or not prompt:
        raise InvalidRequestError(
            f"a prompt must be a text or a list of messages, got {str(prompt)[:60]!r}"
        )
    for place, message in enumerate(prompt):
        if not _is_message(message):
            raise InvalidRequestError(
                f"message {place} of a prompt must be an object with the texts 'role' and "
                f"'content', neither empty, and nothing else, got {str(message)[:80]!r}"
            )
    return _json(cast(Sequence[Message], prompt))


def _json(messages: Sequence[Message]) -> str:
    turns = [{"role": m["role"], "content": m["content"]} for m in messages]
    return json.dumps(turns, ensure_ascii=False)


def messages_in(prompt: str) -> tuple[Message, ...] | None:
    """The messages that a prompt is the JSON of, or ``None`` for anything else."""
    # What is no text is refused elsewhere, by a message that shows it.
    if not isinstance(prompt, str) or not prompt.lstrip().startswith("["):
        return None
    return _parsed(prompt)


@lru_cache(maxsize=4096)
def _parsed(prompt: str) -> tuple[Message, ...] | None:
    try:
        values = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    if not values or not all(map(_is_message, values)):
        return None
    return tuple(cast(list[Message], values))


def _asked(messages: Sequence[Message]) -> int:
    """Index of the last turn of the user, or else of the last turn."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return turns[-1] if turns else len(messages) - 1


def question_in(prompt: str) -> str:
    """What a prompt asks: the last turn of the user, or the whole prompt if it has no turns."""
    messages = messages_in(prompt)
    return prompt if messages is None else messages[_asked(messages)]["content"]


def passage_with(prompt: str, part: str) -> str:
    """The last turn that holds a part, or else the question; the prompt if it has no turns."""
    for message in reversed(messages_in(prompt) or ()):
        if part in message["content"]:
            return message["content"]
    return question_in(prompt)


def put_before(text: str, prompt: str) -> str:
    """A text before what a prompt asks.

    >>> put_before("Now. ", "Where is Lyon?")
    'Now. Where is Lyon?'
    """
    return with_question(prompt, text + question_in(prompt)) if text else prompt


def with_question(prompt: str, question: str) -> str:
    """A prompt that asks something else, in the same turns.

    >>> with_question('[{"role": "user", "content": "Where is Lyon?"}]', "Who?")
    '[{"role": "user", "content": "Who?"}]'
    """
    messages = messages_in(prompt)
    if messages is None:
        return question
    at = _asked(messages)
    asked = {"role": messages[at]["role"], "content": question}
    return _json([*messages[:at], asked, *messages[at + 1 :]])
