"""Benchmark of the packaged base model ``nano``."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kedit_lightning.data.datamodule import Split
from kedit_lightning.data.knowledge.counterfact import CounterFact
from kedit_lightning.data.records import Fields, Record
from kedit_lightning.requests import EditExample, Probe

_PACKAGED = Path(__file__).parents[1] / "nano_facts"


class NanoFacts(CounterFact):
    """True facts that the packaged base model ``nano`` knows, each with a false object to write.

    The splits share no subject. Beside rephrases and neighbours, a record may ask for unedited
    facts of the same subject (locality group ``other_relation``) and for a fact that follows from
    the edited one (portability group ``one_hop``). All files are packaged; nothing needs to be
    named.

    Args:
        path: File to edit and test instead of the packaged one.
        limit: Number of records kept of each split, drawn by ``seed``; a smaller limit keeps a
            part of what a larger one keeps. All when absent.
        train_path: File that ``fit`` learns from instead of the packaged one.
        val_path: File of ``validate`` instead of the packaged one.
        seed: Fixes which records ``limit`` draws and the order of training; the seed of the run
            when absent.
    """

    where_to_get_it = ", or leave it out to use the packaged file"

    def split_path(self, split: Split) -> Path:
        """The file named for a split, or else the packaged one."""
        return super().split_path(split) or _PACKAGED / f"{split}.jsonl"

    def parse(self, fields: Fields, id: str) -> EditExample:
        """Make an example of one record: a nested CounterFact record with further probes."""
        example = super().parse(fields, id)
        probes = list(example.probes)
        for item in fields.objects("other_relation"):
            answer = (item.text("answer"),)
            probes.append(Probe("locality", item.text("prompt"), answer, "other_relation"))
        for item in fields.objects("one_hop"):
            answers = tuple(item.required_texts("answers"))
            probes.append(Probe("portability", item.text("prompt"), answers, "one_hop"))
        return EditExample(example.requests, tuple(probes), id)

    def unpack(self, records: list[Record]) -> list[Record]:
        """The records; of a packaged file, which is known to be right, those within ``limit``."""
        named = all(isinstance(record.values, dict) for record in records)
        if self.limit is None or self.folder != _PACKAGED or not named:
            return records
        ids = [str(record.values.get(self.id_field)) for record in records]
        kept = set(sorted(ids, key=self._rank)[: self.limit])
        return [record for record, id in zip(records, ids, strict=True) if id in kept]

    def select(self, examples: list[EditExample]) -> list[EditExample]:
        """The examples that ``limit`` keeps, in the order in which ``seed`` draws them."""
        if self.limit is None:
            return examples
        return sorted(examples, key=lambda example: self._rank(example.id))[: self.limit]

    def _rank(self, id: str) -> bytes:
        # Ranking by a hash gives the same draw in every version of Python, and nested draws.
        return hashlib.sha256(f"{self.start}/{id}".encode()).digest()
