"""Sets of questions about unrelated things: Natural Questions, PIQA, and passages of text."""

from __future__ import annotations

from pathlib import Path

from kedit_lightning.data.plain_text import halved, passages_of
from kedit_lightning.data.probe_fields import answers_of
from kedit_lightning.data.record_sources import read_source
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import DataFileError, InvalidRequestError
from kedit_lightning.requests import EditExample, Probe


def locality_set(path: Path) -> list[Probe]:
    """The questions of a file of NQ-open or PIQA, told apart by content, or the passages of a text.

    NQ-open has ``question`` and ``answer`` (a list), group ``nq``. PIQA has ``goal``, ``sol1`` and
    ``sol2``; which of them is right stands in another file, so that its probes, group ``piqa``, ask
    whether the base model's own answer stays. A text file (``.txt``) has a passage a line, whose
    first half is the prompt and second half the answer, group ``text``.

    Raises:
        DataFileError: A record is neither.
    """
    if path.suffix == ".txt":
        pairs = map(halved, passages_of(path))
        return [Probe("locality", prompt, (rest,), "text") for prompt, rest in pairs]
    records, _ = read_source(path)
    probes: list[Probe] = []
    for record in records:
        try:
            if record.problem is not None:
                raise InvalidRequestError(record.problem)
            fields = Fields(record.values)
            if "goal" in fields:
                probes.append(Probe("locality", fields.text("goal"), (), "piqa"))
            else:
                answers = answers_of(fields, "answer")
                probes.append(Probe("locality", fields.text("question"), answers, "nq"))
        except InvalidRequestError as error:
            raise DataFileError(
                f"{record.where}: {error}; a locality set has the records of NQ-open (question, "
                "answer) or of PIQA (goal, sol1, sol2)"
            ) from error
    return probes


def with_locality(
    examples: list[EditExample], probes: list[Probe], count: int
) -> list[EditExample]:
    """Each example with ``count`` more probes, dealt out in the order of the set, then again."""
    return [
        EditExample(
            example.requests,
            (*example.probes, *(probes[(i * count + j) % len(probes)] for j in range(count))),
            example.id,
        )
        for i, example in enumerate(examples)
    ]
