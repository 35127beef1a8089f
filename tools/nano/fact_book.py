"""The facts of ``nano`` and plain text, as they are read from files."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stand_ins import stand_in


@dataclass(frozen=True)
class Fact:
    """A true triple, under our own relation name."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class FactBook:
    """The shipped facts and templates."""

    facts: list[Fact]
    templates: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> FactBook:
        """Read ``facts.jsonl`` and ``templates.json``."""
        lines = (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines()
        templates = json.loads((folder / "templates.json").read_text(encoding="utf-8"))
        return cls([Fact(**json.loads(line)) for line in lines], templates)

    def sentences(self) -> Iterator[str]:
        """Every fact in every training template, and stand-ins in every template."""
        for fact in self.facts:
            for template in self.templates[fact.relation]["train"]:
                yield f"{template.format(fact.subject)} {fact.object}."
        rng = random.Random(0)
        for relation, entry in self.templates.items():
            objects = [fact.object for fact in self.facts if fact.relation == relation]
            for template in (entry["train"] + entry["held_out"]) * 10:
                yield f"{template.format(stand_in(entry['kind'], rng))} {rng.choice(objects)}."


def plain_sentences(path: Path) -> list[str]:
    """Readable lines of a plain text file; undoes the spacing of tokenised Wikipedia text."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = re.sub(r" @(.)@ ", r"\1", line.strip())
        text = re.sub(r" ([.,;:!?)'%]|n't|'s)(?=\s|$)", r"\1", text).replace("( ", "(")
        text = re.sub(r'" ([^"]*) "', r'"\1"', text)
        lines += [
            sentence
            for sentence in re.split(r"(?<=[a-z]\.) (?=[A-Z])", text)
            if "<unk>" not in sentence and len(sentence) > 40 and not sentence.startswith("=")
        ]
    if not lines:
        raise ValueError(f"{path}: no line of running text")
    return lines
