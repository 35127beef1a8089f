"""Prompts to be answered with and without edits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.benchmark.run_context import PromptBatch
from kedit_lightning.character_forms import is_unicode
from kedit_lightning.data.dataloader import BatchLoader, chunks
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, UnsupportedUseError


def read_prompts(
    file: str | Path | None = None, prompt: str | Sequence[str] | None = None
) -> list[str]:
    """The prompts that were given, or those of a file: text with one prompt per line, or JSON.

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
    entries = entries if isinstance(entries, list) and entries else [None]
    prompts: list[Any] = [
        entry.get("prompt") if isinstance(entry, dict) else entry for entry in entries
    ]
    for place, text in enumerate(prompts):
        if not isinstance(text, str) or not text.strip():
            raise DataFileError(
                f"{path}: entry {place} is no prompt; the file must be a JSON list (or lines) of "
                "texts, or of objects with a text in the field 'prompt'"
            )
        if not is_unicode(text):
            raise DataFileError(f"{path}: entry {place} holds what is no character: {text!r}")
    return prompts


def prompt_loader(prompts: Sequence[str], batch_size: int) -> BatchLoader[PromptBatch]:
    """Batches of prompts for Lightning's loop."""
    batches = [PromptBatch(list(chunk)) for chunk in chunks(prompts, batch_size)]
    return BatchLoader(lambda epoch: batches, len(batches), {"prompts": len(prompts)})
