"""Records of data files with their line or index, and typed access to their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kedit_lightning.character_forms import is_unicode
from kedit_lightning.chat_turns import messages_in, prompt_text
from kedit_lightning.data.field_names import meant
from kedit_lightning.errors import InvalidRequestError, article_list


@dataclass(frozen=True)
class Record:
    """One entry of a data file."""

    where: str  # file name and line, or index in a JSON list
    values: Any = None  # the entry as JSON parses it; any JSON value
    problem: str | None = None  # reason why the entry could not be parsed


class RepeatedKeys(dict[str, Any]):
    """A JSON object in which keys stand more than once; it has the last value of each."""

    repeated: list[str]


class Fields:
    """The fields of a record, or of an object inside it, read with their types checked.

    ``path`` is that of the object in the record, such as ``requested_rewrite.target_new``.

    Raises:
        InvalidRequestError: From every method, naming the field, when a value does not fit.
    """

    def __init__(self, values: Any, path: str = "") -> None:
        if not isinstance(values, Mapping):
            place = f"field '{path}'" if path else "the record"
            raise InvalidRequestError(f"{place} must be an object with fields, got {_show(values)}")
        self.values = values
        self.path = path
        if isinstance(values, RepeatedKeys):
            names = article_list([f"'{self.place(name)}'" for name in values.repeated])
            raise InvalidRequestError(f"field {names} stands there twice; keep one of them")

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def place(self, key: str) -> str:
        """The full name of a field."""
        return f"{self.path}.{key}" if self.path else key

    def text(self, key: str) -> str:
        """A required text that is not empty."""
        if key not in self:
            names = ", ".join(map(str, self.values)) or "none"
            raise InvalidRequestError(
                f"field '{self.place(key)}' is missing (fields here: {names}"
                f"{meant(key, self.values)})"
            )
        return _text(self.values[key], self.place(key))

    def prompt(self) -> str:
        """The text of ``prompt``; or of ``messages``, a list of objects with role and content."""
        if "messages" in self and "prompt" in self:
            raise InvalidRequestError(
                f"fields '{self.place('prompt')}' and '{self.place('messages')}' are two forms of "
                "one thing; leave out one of them"
            )
        key = "messages" if "messages" in self else "prompt"
        if key == "prompt" and not isinstance(self.values.get("prompt"), list):
            return self.text("prompt")
        return _chat(self.values[key], self.place(key))

    def prompts(self, key: str) -> list[str]:
        """A list of prompts, each a text or messages, or a single text; empty when absent."""
        if not isinstance(self.values.get(key), list):
            return self.texts(key)
        return [
            _chat(item, place) if isinstance(item, list) else _text(item, place)
            for item, place in self._list(key)
        ]

    def optional_text(self, key: str) -> str | None:
        """A text that may be absent or null, but not empty."""
        return self.text(key) if key in self else None

    def texts(self, key: str) -> list[str]:
        """A list of texts, or a single text; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if isinstance(value, str):
            return [_text(value, self.place(key))]
        return [_text(item, place) for item, place in self._list(key)]

    def required_texts(self, key: str) -> list[str]:
        """A list of at least one answer, or a single one."""
        if not (texts := self.texts(key)):
            raise InvalidRequestError(f"field '{self.place(key)}' must hold at least one answer")
        return texts

    def fields(self, key: str) -> Fields:
        """An object inside this one."""
        if key not in self:
            raise InvalidRequestError(f"field '{self.place(key)}' is missing")
        return Fields(self.values[key], self.place(key))

    def refuse_others(self, *known: str) -> None:
        """Refuse fields that are not among those known, and name what each may stand for."""
        if others := [str(name) for name in self.values if name not in known]:
            named = [f"'{self.place(o)}'{meant(o, known, ' (was {} meant?)')}" for o in others]
            raise InvalidRequestError(
                f"field {article_list(named)} is not read; fields here are {', '.join(known)}"
            )

    def objects(self, key: str) -> list[Fields]:
        """A list of objects; empty when absent."""
        return [Fields(item, place) for item, place in self._list(key)] if key in self else []

    def groups(self, key: str) -> list[tuple[str, Fields]]:
        """The objects of ``{group: [object, ...]}``, each with the name of its group."""
        groups = self.fields(key) if key in self else Fields({})
        return [(name, item) for name in groups.values for item in groups.objects(name)]

    def _list(self, key: str) -> list[tuple[Any, str]]:
        value, place = self.values[key], self.place(key)
        if not isinstance(value, list):
            raise InvalidRequestError(f"field '{place}' must be a list, got {_show(value)}")
        return [(item, f"{place}[{i}]") for i, item in enumerate(value)]


def _chat(value: Any, place: str) -> str:
    try:
        text = prompt_text(value)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"field '{place}': {error}") from error
    if messages_in(text) is None:
        raise InvalidRequestError(
            f"field '{place}' must be a list of objects with the texts 'role' and 'content', got "
            f"{_show(value)}"
        )
    return text


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequestError(
            f"field '{place}' must be text that is not empty, got {_show(value)}"
        )
    if not is_unicode(value):
        raise InvalidRequestError(
            f"field '{place}' is not UTF-8 text, got {_show(value)}; save the file as UTF-8, or "
            "take out halves of surrogate pairs"
        )
    return value


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
