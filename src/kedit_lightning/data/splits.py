"""The examples of a split, and what messages and results say about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from kedit_lightning.requests import EditExample

# Number of bad or skipped records that a message lists; results files list all of them.
_SHOWN = 20


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


def listed(clauses: Sequence[str]) -> str:
    """Clauses for a message, which a count cuts short."""
    more = f"; and {len(clauses) - _SHOWN} more" if len(clauses) > _SHOWN else ""
    return "; ".join(clauses[:_SHOWN]) + more


def contradictions(examples: list[EditExample], name: str) -> int:
    """Count prompts that come with different targets, and warn: no model can satisfy them all."""
    targets: dict[str, dict[str, str]] = defaultdict(dict)
    for example in examples:
        for request in example.requests:
            targets[request.prompt].setdefault(request.target_new.strip(), example.id)
    if found := {prompt: ids for prompt, ids in targets.items() if len(ids) > 1}:
        prompt, ids = next(iter(found.items()))
        shown = " and ".join(f"{target!r} (record {id!r})" for target, id in list(ids.items())[:2])
        rank_zero_warn(
            f"{name}: {len(found)} prompt{'s' * (len(found) > 1)} with contradictory targets, such "
            f"as {prompt!r} with {shown}; edits that stay (sequential or batch mode) cannot "
            "satisfy both"
        )
    return len(found)
