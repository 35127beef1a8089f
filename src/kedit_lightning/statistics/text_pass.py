"""Resumable pass over text.

Sums and position are kept in a partial file of the cache.  A later pass over the same text, with
the same base model and settings, resumes from it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kedit_lightning.errors import DataFileError, ResumeError
from kedit_lightning.statistics.covariance_cache import statistics_dir
from kedit_lightning.statistics.key_collector import KeyCollector
from kedit_lightning.statistics.key_sums import hash_texts, no_texts
from kedit_lightning.statistics.moment_file import FORMAT_VERSION
from kedit_lightning.statistics.sealed_file import SealedFile, write_sealed

_KIND = "kedit_partial_statistics"


def pause_after(took: float) -> float:
    """Seconds to the next write of a partial file, so that writes take at most 5 % of the time."""
    return max(60.0, 20 * took)


class TextPass:
    """Passes each batch of text to a collector once, also when a pass was interrupted.

    Args:
        collector: The collector; it is restored from the partial file, if there is one.
        identity: Values that fix the order of batches (file hash, batch size, processes, ...).
        rank: Number of this process.
    """

    def __init__(self, collector: KeyCollector, identity: Mapping[str, Any], rank: int = 0) -> None:
        self.collector = collector
        base = collector.base
        key = {
            "format_version": FORMAT_VERSION,
            "fingerprint": base.fingerprint,
            "tokenizer": base.tokenizer_fingerprint,
            "dtype": str(base.dtype).removeprefix("torch."),
            "max_tokens": collector.max_tokens,
            "modules": list(collector.modules),
            "identity": {name: str(value) for name, value in sorted(identity.items())},
            "rank": rank,
        }
        self._key = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(self._key.encode()).hexdigest()[:24]
        self.path = statistics_dir() / "partial" / f"{name}.safetensors"
        #: Number of batches whose keys are in the sums.
        self.batches = 0
        self._load()
        self._done_before = self.batches
        #: Batches seen, and those skipped from the first one on, with the hash of their texts.
        self._seen = self._skipped = 0
        self._skipped_hash = no_texts()
        self._whole = True
        self._saved_at, self._pause = time.monotonic(), pause_after(0.0)

    def read(self, number: int, texts: Sequence[str]) -> None:
        """Collect the keys of batch ``number`` (from 0), unless an interrupted pass has them.

        Raises:
            ResumeError: Batches are missing, or the skipped texts differ from those of the
                interrupted pass.
        """
        self._seen = number + 1
        if number < self._done_before:
            self._skip(number, texts)
            return
        if number != self.batches:
            raise ResumeError(
                f"the checkpoint goes on with batch {number} of the text, and the cache holds the "
                f"sums of the first {self.batches} only (looked for {self.path}); run the same "
                "command without --ckpt_path, which continues from what the cache holds"
            )
        self._whole = False
        self.collector.read(texts)
        self.batches, self._whole = number + 1, True
        if time.monotonic() - self._saved_at >= self._pause:
            self.save()

    def _skip(self, number: int, texts: Sequence[str]) -> None:
        if number != self._skipped:
            return  # the pass resumed from a checkpoint: there is nothing to compare
        self._skipped_hash += hash_texts([text for text in texts if text.strip()])
        self._skipped += 1
        same = torch.equal(self._skipped_hash, self.collector.state()["hash"])
        if self._skipped == self._done_before and not same:
            self._refuse_changed_text()

    def is_new(self, number: int) -> bool:
        """Whether no interrupted pass has read a batch."""
        return number >= self._done_before

    def check_complete(self) -> None:
        """Raise a ``ResumeError`` if the text has fewer batches than an interrupted pass read."""
        if self._seen < self._done_before:
            self._refuse_changed_text()

    def _refuse_changed_text(self) -> None:
        self.discard()
        raise ResumeError(
            f"the text has changed since an interrupted fit read its first {self._done_before} "
            "batches; what that fit had summed is removed now, so run the command again"
        )

    # ---- the partial file

    def save(self) -> None:
        """Write sums and position; does nothing in the middle of a batch."""
        if not (self._whole and self.batches):
            return
        started = time.monotonic()
        header = {"key": self._key, "batches": self.batches}
        write_sealed(self.path, _KIND, header, self.collector.state())
        self._saved_at = time.monotonic()
        self._pause = pause_after(self._saved_at - started)

    def discard(self) -> None:
        """Remove the partial file."""
        self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        if not self.path.is_file():
            return
        try:
            file = SealedFile(self.path, _KIND)
            if not file.sealed or file.values.get("key") != self._key:
                return
            state = file.tensors()
        except DataFileError:
            return  # an incomplete, damaged or foreign file: start over, and overwrite it
        self.collector.load_state(state)
        self.batches = int(file.values["batches"])
