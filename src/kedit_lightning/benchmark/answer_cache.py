"""Disk cache of base-model answers, so that they are computed once."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kedit_lightning.cache_folder import cache_dir
from kedit_lightning.metrics import ProbeReading


def key_of(*parts: Any) -> str:
    """Hash of plain values, as a cache key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class AnswersCache:
    """Readings of probes on an unedited base model, in one JSONL file for each set of settings.

    ``settings`` are the plain values that readings depend on beside the probe itself. A line holds
    the readings that were measured together; one that a crash has cut off is skipped.  With
    ``on_disk`` off, readings are neither read from the file nor written to it.
    """

    def __init__(
        self, settings: Mapping[str, Any], folder: Path | None = None, on_disk: bool = True
    ) -> None:
        self._on_disk = on_disk
        self.path = (folder or cache_dir() / "answers") / f"{key_of(dict(settings))}.jsonl"
        self._known: dict[str, ProbeReading] | None = None
        self._warned = False

    @property
    def known(self) -> dict[str, ProbeReading]:
        """Readings by key."""
        if self._known is None:
            self._known = {}
            there = self._on_disk and self.path.is_file()
            text = self.path.read_text(encoding="utf-8") if there else ""
            for line in filter(None, text.split("\n")):
                with suppress(json.JSONDecodeError):  # cut off by a crash
                    self._known.update(json.loads(line))
        return self._known

    def add(self, readings: Mapping[str, ProbeReading]) -> None:
        """Add readings that were measured together, in memory and on disk."""
        if not readings:
            return
        # Through JSON, so that this run uses the same values as a later one that reads the file.
        line = json.dumps(readings)
        self.known.update(json.loads(line))
        if not self._on_disk:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write, as several processes may append at once; the first line break ends a line
            # that a crash has cut off.
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, f"\n{line}\n".encode())
            finally:
                os.close(handle)
        except OSError as error:
            if not self._warned:
                warnings.warn(
                    f"answers of the base model are not kept for later runs ({error}); point "
                    "KEDIT_CACHE at a folder that can be written to",
                    stacklevel=2,
                )
            self._warned = True
