"""The examples of a split, with the facts about them that go into results files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kedit_lightning.requests import EditExample, EditRequest, Probe


@dataclass
class LoadedSplit:
    """The examples of a split, with the facts about them that go into results files."""

    examples: list[EditExample]
    path: str | None
    sha256: str
    skipped: list[str] = field(default_factory=list)
    contradictions: int = 0
    #: Where the record of each example stands, by the example's id.
    places: dict[str, str] = field(default_factory=dict)

    def items(self) -> Iterator[EditRequest | Probe]:
        """All requests and probes."""
        for example in self.examples:
            yield from example.requests
            yield from example.probes

    def source(self) -> dict[str, Any]:
        """Plain values for results files."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "records": len(self.examples),
            "skipped": len(self.skipped),
            "skipped_records": list(self.skipped),
            "contradictory_prompts": self.contradictions,
        }
