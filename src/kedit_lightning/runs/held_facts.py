"""Which facts hold under the edits of a run, in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

from kedit_lightning.errors import FactsNotWrittenError, FactsNotWrittenWarning, article_list
from kedit_lightning.metrics import ExampleRecord


class HeldFacts(NamedTuple):
    """How many facts hold, and those that do not.

    A fact holds if each token of the wanted answer is the most likely one.

    Args:
        facts: Number of facts.
        missing: Prompt and wanted answer of each that does not hold.
        alone: How many held each under its own edit; ``None`` where all were scored together.
    """

    facts: int
    missing: list[str]
    alone: int | None = None

    @classmethod
    def of(cls, records: Iterable[ExampleRecord]) -> HeldFacts:
        """From the records of a run; of an example, the last one tells what holds."""
        first: dict[str, list[tuple[str, bool]]] = {}
        last: dict[str, list[tuple[str, bool]]] = {}
        for record in records:
            facts = [
                (f"{probe['prompt']!r} -> {probe['answers'][0].strip()!r}", bool(right))
                for probe in record["probes"]
                if probe["kind"] == "rewrite" and (right := probe["after"]["tf_all"]) is not None
            ]
            last[record["id"]] = facts
            if record["stage"] == "immediate":
                first[record["id"]] = facts
        found = [fact for facts in last.values() for fact in facts]
        alone = [holds for facts in first.values() for _, holds in facts]
        return cls(
            len(found),
            [name for name, holds in found if not holds],
            sum(alone) if any(last[id] is not facts for id, facts in first.items()) else None,
        )

    def sentence(self, way_out: str) -> str:
        """How many hold, which do not, and the way out.

        >>> HeldFacts(2, []).sentence("try another method")
        '2 of 2 facts hold'
        >>> HeldFacts(1, ["'A is' -> 'B'"]).sentence("try another method")
        "0 of 1 fact holds; not written: 'A is' -> 'B'; try another method"
        """
        count, held = self.facts, self.facts - len(self.missing)
        said = f"{held} of {count} fact{'s hold' if count != 1 else ' holds'}"
        if self.alone is not None:
            said += f" under all edits together ({self.alone} each under its own edit)"
        if self.missing:
            said += f"; not written: {article_list(self.missing)}; {way_out}"
        return said

    def concluded(self, way_out: str, strict: bool) -> str:
        """The sentence; with a warning, or as an error, if facts do not hold.

        Raises:
            FactsNotWrittenError: ``strict``, and facts do not hold.
        """
        said = self.sentence(way_out)
        if self.missing and strict:
            raise FactsNotWrittenError(said)
        if self.missing:
            warnings.warn(
                f"{len(self.missing)} of {self.facts} facts do not hold",
                FactsNotWrittenWarning,
                stacklevel=3,
            )
        return said
