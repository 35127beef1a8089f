"""Which facts hold under the edits of a run, in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

from kedit_lightning.contradictions import consistent
from kedit_lightning.data.datamodule import EditDataModule
from kedit_lightning.errors import FactsNotWrittenError, FactsNotWrittenWarning, article_list
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.requests import EditExample


class HeldFacts(NamedTuple):
    """How many facts hold, and those that do not.

    A fact holds if each token of the wanted answer is the most likely one.

    Args:
        facts: Number of facts, without those that are overwritten.
        missing: Prompt and wanted answer of each that does not hold.
        alone: How many held each under its own edit; ``None`` where all were scored together.
        overwritten: Prompt and wanted answer of each that a later fact contradicts, which therefore
            is not to hold.
    """

    facts: int
    missing: list[str]
    alone: int | None = None
    overwritten: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, records: Iterable[ExampleRecord], data: Any = None, whole: bool = False
    ) -> HeldFacts:
        """From the records of a run; of an example, the last one tells what holds.

        Args:
            records: The records.
            data: Where their facts come from, by which those are told that others overwrite.
            whole: Facts without a record are not written: the run has ended before them.
        """
        examples = data.examples("test") if isinstance(data, EditDataModule) else []
        overwritten = _overwritten(examples)
        first: dict[str, list[tuple[str, bool]]] = {}
        last: dict[str, list[tuple[str, bool]]] = {}
        for record in records:
            named = [
                (_name(probe["prompt"], probe["answers"][0]), probe["after"]["tf_all"])
                for probe in record["probes"]
                if probe["kind"] == "rewrite"
            ]
            facts = [
                (name, bool(right))
                for name, right in named
                if right is not None and name not in overwritten
            ]
            last[record["id"]] = facts
            if record["stage"] == "immediate":
                first[record["id"]] = facts
        if whole:
            for example in examples:
                names = [_name(request.prompt, request.target_new) for request in example.requests]
                unread = [(name, False) for name in names if name not in overwritten]
                last.setdefault(example.id, unread)
        found = [fact for facts in last.values() for fact in facts]
        alone = [holds for facts in first.values() for _, holds in facts]
        return cls(
            len(found),
            [name for name, holds in found if not holds],
            sum(alone) if any(last[id] is not facts for id, facts in first.items()) else None,
            overwritten,
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
        if self.overwritten:
            said += f"; overwritten by a later fact: {article_list(list(self.overwritten))}"
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


def _name(prompt: str, answer: str) -> str:
    return f"{prompt!r} -> {answer.strip()!r}"


def _overwritten(examples: Iterable[EditExample]) -> tuple[str, ...]:
    """Facts that later ones contradict, and that no later one states again."""
    requests = [request for example in examples for request in example.requests]
    written = {_name(request.prompt, request.target_new) for request in consistent(requests)}
    named = dict.fromkeys(_name(request.prompt, request.target_new) for request in requests)
    return tuple(name for name in named if name not in written)
