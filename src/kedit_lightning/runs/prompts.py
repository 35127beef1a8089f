"""Prompts to be answered with and without edits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.benchmark.run_context import PromptBatch
from kedit_lightning.data.dataloader import BatchLoader, chunks
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, UnsupportedUseError


def read_prompts(file: str | Path | None = None, prompt: str | None = None) -> list[str]:
    """Prompts of a file, or the one prompt that was given.

    Args:
        file: Text with a prompt a line, JSON Lines, or a JSON list; of texts, or of objects with
            ``prompt``.
        prompt: A prompt.

    Raises:
        DataFileError: The file is absent, or holds something else.
        UnsupportedUseError: Both were given.
    """
    if prompt is not None and file is not None:
        raise UnsupportedUseError("give either --prompt or --prompts, not both")
    if prompt is not None:
        return [prompt]
    if file is None:
        return []
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataFileNotFoundError(
            f"there is no file of prompts at {path}; correct --prompts, or give one with --prompt"
        )
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        if path.suffix == ".json":
            entries = json.loads("\n".join(lines))
        else:
            entries = [json.loads(line) if path.suffix == ".jsonl" else line for line in lines]
    except json.JSONDecodeError as error:
        raise DataFileError(f"{path} is no JSON: {error}") from error
    prompts = [_prompt_of(entry) for entry in entries] if isinstance(entries, list) else [None]
    found = [text for text in prompts if text is not None]
    if not found or len(found) != len(prompts):
        where = prompts.index(None) if None in prompts else 0
        raise DataFileError(
            f"{path}: entry {where} is no prompt; the file must be a JSON list (or lines) of "
            "texts, or of objects with a text in the field 'prompt'"
        )
    return found


def _prompt_of(entry: Any) -> str | None:
    text = entry.get("prompt") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text.strip() else None


def prompt_loader(prompts: Sequence[str], batch_size: int) -> BatchLoader[PromptBatch]:
    """Batches of prompts for Lightning's loop.

    Args:
        prompts: The prompts.
        batch_size: Prompts answered together.
    """
    batches = [PromptBatch(list(chunk)) for chunk in chunks(prompts, batch_size)]
    return BatchLoader(lambda epoch: batches, len(batches), {"prompts": len(prompts)})
