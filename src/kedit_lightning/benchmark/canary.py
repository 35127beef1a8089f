"""What edits do to a language model as a whole: plain text that has nothing to do with them.

The same passages are read at every checkpoint of a stream. The first half of a passage is the
prompt, the second half is scored, so that edits of every kind act as they do on a question.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.data.plain_text import halved
from kedit_lightning.edits import Edit
from kedit_lightning.edits.projections import compute_dtype, find_module, oriented
from kedit_lightning.edits.weight_storage import loaded, matrix_of
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.requests import Probe

#: A model whose perplexity is this many times that of the base model counts as collapsed.
COLLAPSE_FACTOR = 10.0


def halves(base: BaseModel, passage: str) -> tuple[str, str]:
    """Prompt and continuation of a passage, shortened until they fit into the model's window."""
    while True:
        prompt, rest = halved(passage)
        length = base.encoder.count_prompt(prompt) + base.encoder.count(rest) + 2
        if length <= base.max_tokens or not prompt:
            return prompt, rest
        passage = prompt


class Canary:
    """Perplexity of passages, and divergence from the unedited base model on them.

    Args:
        base: The base model.
        passages: The passages.
        batch_size: Rows of a forward pass; it changes no value.
    """

    def __init__(self, base: BaseModel, passages: Sequence[str], batch_size: int = 32) -> None:
        self.base = base
        self.sha256 = hashlib.sha256("\n".join(passages).encode()).hexdigest()
        protocol = Protocol(generate=False, score_batch_size=batch_size)
        self._reader = Reader(base, protocol, self.sha256)
        cut = [halves(base, passage) for passage in passages]
        self._probes = [Probe("locality", prompt, (rest,)) for prompt, rest in cut]
        with base.edits.suspended():
            self._tokens = [len(base.encode(prompt, rest).answer) for prompt, rest in cut]
        self._base_readings = self._reader.base_readings(self._probes)

    def base_perplexity(self) -> float:
        """Perplexity of the unedited base model."""
        return self._perplexity(self._base_readings)

    def measure(self) -> dict[str, float]:
        """``perplexity`` of the second halves, and ``kl``, under the edits as they stand.

        ``perplexity`` is ``exp`` of the mean negative log-likelihood of all their tokens. ``kl`` is
        the mean over passages of the divergence of the edited model's distributions from the base
        model's, mean over the tokens of a passage, in nats; ``kl_p95`` its 95th percentile.
        """
        readings = self._reader.readings(self._probes, self._base_readings)
        kl = torch.tensor([reading["kl"] for reading in readings], dtype=torch.float64)
        return {
            "perplexity": self._perplexity(readings),
            "kl": kl.mean().item(),
            "kl_p95": kl.quantile(0.95).item(),
        }

    def _perplexity(self, readings: Sequence[Mapping[str, Any]]) -> float:
        sums = zip(readings, self._tokens, strict=True)
        total = -sum(float(reading["log_prob"]) * count for reading, count in sums)
        mean = total / sum(self._tokens)
        return math.exp(mean) if mean < 700 else math.inf  # the largest that a float holds


class WeightGrowth:
    """How far the weights of a base model are moved by the edits on its stack.

    Changes are added up in at least float32, each edit once, in the order of the stack.

    Args:
        base: The base model.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._sums: dict[str, Tensor] = {}
        self._counted: set[int] = set()

    @torch.no_grad()
    def measure(self, edits: Sequence[Edit]) -> dict[str, dict[str, float]]:
        """For each parameter ``change`` ``‖W - W₀‖ / ‖W₀‖`` and ``norm`` ``‖W‖ / ‖W₀‖``.

        Norms are Frobenius'. Edits that change no weights, such as memories, add nothing.
        """
        for edit in edits:
            if id(edit) not in self._counted:
                self._counted.add(id(edit))
                self._add(edit)
        found = {}
        for name, change in self._sums.items():
            weight = self._weight(name).to(change.device)
            size = weight.norm()
            found[name] = {
                "change": (change.norm() / size).item(),
                "norm": ((weight + change).norm() / size).item(),
            }
        return found

    def _add(self, edit: Edit) -> None:
        try:
            deltas = edit.deltas()
        except UnsupportedUseError:  # a memory, a prompt or a way of decoding
            return
        for name, delta in deltas.items():
            owner, _, own = name.rpartition(".")
            change = delta.detach().cpu().to(compute_dtype(delta.dtype))
            if own == "weight":
                change = oriented(change, find_module(self.base.model, owner))
            known = self._sums.get(name)
            self._sums[name] = change.clone() if known is None else known + change

    def _weight(self, name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        module = find_module(self.base.model, owner)
        if own == "weight":
            return matrix_of(module)
        with loaded(module):
            parameter = module.get_parameter(own).detach()
            return parameter.to(compute_dtype(parameter.dtype), copy=True)


def perplexity_collapse(checkpoints: Sequence[Mapping[str, Any]]) -> int | None:
    """Facts at the first checkpoint with ten times the perplexity of the base model, the first one.

    >>> perplexity_collapse([{"facts": 0, "perplexity": 9.0}, {"facts": 5, "perplexity": 91.0}])
    5
    """
    bound = COLLAPSE_FACTOR * checkpoints[0]["perplexity"]
    return next((entry["facts"] for entry in checkpoints if not entry["perplexity"] <= bound), None)
