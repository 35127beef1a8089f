"""Prompts to be answered with and without edits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.run_context import PromptBatch
from kedit_lightning.character_forms import is_unicode
from kedit_lightning.chat_turns import prompt_text
from kedit_lightning.data.dataloader import BatchLoader, chunks
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import (
    DataFileError,
    DataFileNotFoundError,
    InvalidRequestError,
    UnsupportedUseError,
    article_list,
)

_FORM = (
    "a JSON list (or lines) of texts, of chats (lists of messages with role and content), or of "
    "objects with one of them in the field 'prompt' or 'messages'"
)


def read_prompts(
    file: str | Path | None = None, prompt: str | Sequence[str] | None = None
) -> list[str]:
    """The prompts that were given, or those of a file: text with one prompt per line, or JSON.

    In JSON a prompt may also be messages, or an object with ``prompt`` or ``messages``.

    Raises:
        DataFileError: The file is absent, or holds something else.
        UnsupportedUseError: Both were given.
    """
    if prompt is not None and file is not None:
        raise UnsupportedUseError("give either --prompt or --prompts, not both")
    if prompt is not None:
        return [prompt] if isinstance(prompt, str) else list(prompt)
    if file is None:
        return []
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataFileNotFoundError(
            f"there is no file of prompts at {path}; correct --prompts, or give one with --prompt"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path} is not UTF-8 text (byte {error.start})") from error
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        if path.suffix == ".json":
            entries = json.loads("\n".join(lines))
        else:
            entries = [json.loads(line) if path.suffix == ".jsonl" else line for line in lines]
    except json.JSONDecodeError as error:
        raise DataFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataFileError(f"{path} must be {_FORM}")
    return [_prompt(entry, f"{path}: entry {place}") for place, entry in enumerate(entries)]


def _prompt(entry: Any, place: str) -> str:
    try:
        text = Fields(entry).prompt() if isinstance(entry, dict) else prompt_text(entry)
    except InvalidRequestError as error:
        raise DataFileError(f"{place} is no prompt: {error}; the file must be {_FORM}") from error
    if not text.strip():
        raise DataFileError(f"{place} is no prompt, but empty; the file must be {_FORM}")
    if not is_unicode(text):
        raise DataFileError(f"{place} holds what is no character: {text!r}")
    return text


def check_prompts(base: BaseModel, prompts: Sequence[str]) -> None:
    """Make sure that a model can read all prompts, without and with the edits that are applied.

    Raises:
        InvalidRequestError: It cannot; the message says why of each, once for equal ones.
    """
    reasons: list[str] = []
    for prompt in dict.fromkeys(prompts):
        try:
            base.encode(prompt)
            with base.edits.suspended():
                base.encode(prompt)
        except InvalidRequestError as error:
            reasons.append(str(error))
    if reasons:
        raise InvalidRequestError(
            f"{len(reasons)} of {len(prompts)} prompts cannot be answered: {article_list(reasons)}"
        )


def prompt_loader(prompts: Sequence[str], batch_size: int) -> BatchLoader[PromptBatch]:
    """Batches of prompts for Lightning's loop."""
    batches = [PromptBatch(list(chunk)) for chunk in chunks(prompts, batch_size)]
    return BatchLoader(lambda epoch: batches, len(batches), {"prompts": len(prompts)})
