"""Random numbers that hang on requests and a seed, and on nothing that ran before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from kedit_lightning.requests import EditRequest


def request_generator(
    seed: int | None, requests: Sequence[EditRequest], purpose: str
) -> torch.Generator:
    """A generator for one purpose; the same seed, requests and purpose give the same numbers."""
    text = json.dumps([seed, purpose, [(r.prompt, r.target_new) for r in requests]])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)
