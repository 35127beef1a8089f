"""Whether a model is still well under its edits: plain text, norms of weights, and old facts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark.canary import Canary, WeightGrowth
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.benchmark.reader import Reader
from kedit_lightning.contradictions import contradictions
from kedit_lightning.edits import Edit
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.requests import EditRequest, Probe

#: A fact whose answer was less likely than this under its own edit was never written.
WRITTEN = 0.5
#: Fewer old facts say nothing about a share.
LEAST_FACTS = 4


@dataclass(frozen=True)
class Bounds:
    """Where a model counts as no longer well; ``None`` where a quantity is not watched.

    Args:
        perplexity: The most that the perplexity may be, as a multiple of the base model's.
        kl: The most that the mean divergence from the base model may be, in nats a token.
        norm: The most that the norm of an edited weight may be, as a multiple of the base model's.
        facts: The least share of the sampled old facts that must still hold.
    """

    perplexity: float | None = 1.5
    kl: float | None = None
    norm: float | None = None
    facts: float | None = 0.5

    def __post_init__(self) -> None:
        for name in ("perplexity", "norm"):
            if (bound := getattr(self, name)) is not None and not bound > 1:
                raise UnsupportedUseError(
                    f"{name} of a canary is a multiple of the base model's and must be above 1, "
                    f"got {bound}"
                )
        if self.kl is not None and not self.kl > 0:
            raise UnsupportedUseError(f"kl of a canary must be above 0, got {self.kl}")
        if self.facts is not None and not 0 < self.facts <= 1:
            raise UnsupportedUseError(
                f"facts of a canary is a share and must lie in (0, 1], got {self.facts}"
            )


class Health(NamedTuple):
    """What was found under the edits.

    Args:
        perplexity: Perplexity of the passages, over that of the base model.
        kl: Mean divergence from the base model on them, in nats a token.
        norm: The largest ``‖W‖ / ‖W₀‖`` of an edited weight; 1 where none is.
        facts: Share of the sampled old facts that hold; ``None`` where there are too few.
    """

    perplexity: float
    kl: float
    norm: float
    facts: float | None

    def broken(self, bounds: Bounds) -> list[str]:
        """What is out of bounds, in words.

        >>> Health(1.7, 0.2, 1.1, 0.25).broken(Bounds())[0]
        'perplexity is 1.7 times that of the base model (bound 1.5)'
        >>> Health(float("nan"), 0.2, 1.1, None).broken(Bounds(perplexity=None))
        ['perplexity is not finite']
        """
        found = [
            f"{name} is not finite"
            for name in ("perplexity", "kl", "norm")
            if not math.isfinite(getattr(self, name))
        ]
        if found:
            return found
        times = "times that of the base model (bound"
        if bounds.perplexity is not None and self.perplexity > bounds.perplexity:
            found.append(f"perplexity is {self.perplexity:.3g} {times} {bounds.perplexity:g})")
        if bounds.kl is not None and self.kl > bounds.kl:
            found.append(f"the divergence is {self.kl:.3g} nats (bound {bounds.kl:g})")
        if bounds.norm is not None and self.norm > bounds.norm:
            found.append(f"the norm of a weight is {self.norm:.3g} {times} {bounds.norm:g})")
        if bounds.facts is not None and self.facts is not None and self.facts < bounds.facts:
            found.append(f"{self.facts:.0%} of the old facts hold (bound {bounds.facts:.0%})")
        return found


class HealthMonitor:
    """Reads the health of a model under its stack of edits, before another edit joins it.

    Which old facts are asked follows from the seed and the facts alone, so that it is the same
    after an interruption: of those whose edits were seen, the ones with the smallest hashes.

    Args:
        base: The base model, as it stands.
        passages: Passages of plain text.
        bounds: What is watched.
        sample: The most old facts that are asked.
        seed: Seed of their choice.
        batch_size: Rows of a forward pass.
    """

    def __init__(
        self,
        base: BaseModel,
        passages: Sequence[str],
        bounds: Bounds = Bounds(),
        sample: int = 16,
        seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        self.base, self.bounds, self.sample = base, bounds, sample
        self.canary = Canary(base, passages, batch_size)
        self._perplexity = self.canary.base_perplexity()
        self._growth, self._grown = WeightGrowth(base), list[Edit]()
        self._reader = Reader(base, Protocol(generate=False, score_batch_size=batch_size), "health")
        self._seed = seed
        self._seen: set[str] = set()
        self._asked: list[EditRequest] = []

    def read(self, edit: Edit | None = None) -> Health:
        """The health under the stack as it stands, with an edit that is not on it yet."""
        if self.bounds.facts is not None:
            self._remember(edit)
        with self.base.edits.restored():
            if edit is not None:
                edit.apply()
            found = self.canary.measure()
            norm = 1.0
            if self.bounds.norm is not None:
                stack = list(self.base.edits)
                if stack[: len(self._grown)] != self._grown:
                    self._growth = WeightGrowth(self.base)  # edits were taken off
                self._grown = stack
                grown = self._growth.measure(stack).values()
                norm = max((weight["norm"] for weight in grown), default=1.0)
            return Health(
                found["perplexity"] / self._perplexity, found["kl"], norm, self._share_that_holds()
            )

    def _remember(self, edit: Edit | None) -> None:
        """Draw from the facts of edits that are new on the stack; forget what is overwritten."""
        for below in self.base.edits:
            if below.id not in self._seen:
                self._seen.add(below.id)
                origin = below.origin
                noted = origin.notes.get(TARGET_PROBABILITIES, [1.0] * len(origin.requests))
                pairs = zip(origin.requests, noted, strict=False)
                self._forget(origin.requests)
                self._asked += [request for request, held in pairs if held >= WRITTEN]
                self._asked = sorted(self._asked, key=self._hash)[: self.sample]
        if edit is not None:
            self._forget(edit.origin.requests)

    def _forget(self, new: Sequence[EditRequest]) -> None:
        """Leave out facts that new ones contradict."""
        gone = {pair.earlier for pair in contradictions([*self._asked, *new])}
        self._asked = [request for index, request in enumerate(self._asked) if index not in gone]

    def _hash(self, request: EditRequest) -> str:
        text = f"{self._seed}/{request.prompt}/{request.target_new}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _share_that_holds(self) -> float | None:
        if self.bounds.facts is None or len(self._asked) < LEAST_FACTS:
            return None
        probes = [Probe("rewrite", r.prompt, (r.target_new,), image=r.image) for r in self._asked]
        readings = self._reader.readings(probes, self._reader.base_readings(probes))
        return sum(bool(reading["tf_all"]) for reading in readings) / len(readings)
