"""Probes and answers as the field's published files write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from kedit_lightning.character_forms import trimmed
from kedit_lightning.data.records import Fields
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.probe_task import ProbeTask
from kedit_lightning.requests import EditRequest, Probe, ProbeKind


def answers_of(fields: Fields, key: str) -> tuple[str, ...]:
    """Every answer of a field: a text, a list, or a list with a list of aliases for each answer.

    Texts without content are no answers and are left out; the order stays, and none comes twice.

    >>> answers_of(Fields({"a": [["Bonn", ""], ["Berlin", "Bonn"]]}), "a")
    ('Bonn', 'Berlin')

    Raises:
        InvalidRequestError: The field holds something other than texts.
    """
    found: dict[str, str] = {}
    for value, place in _leaves(fields.values.get(key), fields.place(key)):
        if not isinstance(value, str):
            raise InvalidRequestError(
                f"field '{place}' must be text, a list of texts, or a list of such lists, got "
                f"{value!r}"
            )
        if text := trimmed(value):
            found.setdefault(text, value)  # as written: who asks trims, and counts what was trimmed
    return tuple(found.values())


def _leaves(value: Any, place: str) -> Iterable[tuple[Any, str]]:
    if value is None:
        return
    if not isinstance(value, list):
        yield value, place
        return
    for index, item in enumerate(value):
        yield from _leaves(item, f"{place}[{index}]")


def differing(old: str | None, new: str) -> str | None:
    """The old answer, unless it is the new one: a contrast with itself would mean nothing."""
    return None if old is None or trimmed(old) == trimmed(new) else old


def filled(template: str, subject: str, place: str) -> str:
    """A template with the subject in the place of its braces.

    Raises:
        InvalidRequestError: It does not hold ``{}`` once.
    """
    if template.count("{}") != 1:
        raise InvalidRequestError(
            f"field '{place}' must hold '{{}}' once, where the subject stands, got {template!r}"
        )
    # Not str.format: other braces of a template are ordinary text.
    return template.replace("{}", subject)


def rephrases(request: EditRequest, prompts: Iterable[str]) -> list[Probe]:
    """A rephrase probe for each prompt that asks for the new answer."""
    answer = (request.target_new,)
    return [Probe("rephrase", text, answer, contrast=request.target_old) for text in prompts]


def of_task(
    task: ProbeTask, probes: Iterable[Probe], kinds: Sequence[ProbeKind] = ()
) -> list[Probe]:
    """Probes that the metrics of a task score too: all, or those of some kinds."""
    return [replace(one, task=task) if one.kind in kinds or not kinds else one for one in probes]


def neighbours(
    prompts: Iterable[str], old: str, new: str, group: str = "neighborhood"
) -> list[Probe]:
    """Locality probes of other subjects whose right answer is the old one, not the new one."""
    contrast = differing(new, old)
    return [Probe("locality", text, (old,), group, contrast) for text in prompts]


def probe(
    kind: ProbeKind, item: Fields, group: str, prompt: str = "prompt", answer: str = "answer"
) -> Probe | None:
    """A probe of one object, or ``None`` where it has a prompt but no answer to judge by.

    A locality probe needs no answer: it asks whether the base model's own one has changed.
    """
    text, answers = item.text(prompt), answers_of(item, answer)
    return Probe(kind, text, answers, group) if answers or kind == "locality" else None


def grouped_probes(fields: Fields, kind: ProbeKind, answer: str = "ground_truth") -> list[Probe]:
    """Probes of ``{kind: {group: [{prompt, answer}, ...]}}``, or of lists by field in a group."""
    if kind not in fields:
        return []
    groups, found = fields.fields(kind), []
    for name in groups.values:
        if isinstance(groups.values[name], dict):
            items: Sequence[Fields] = parallel(groups.fields(name), "prompt", answer)
        else:
            items = groups.objects(name)
        found += [probe(kind, item, name, "prompt", answer) for item in items]
    return [one for one in found if one is not None]


def parallel(fields: Fields, *keys: str) -> list[Fields]:
    """The rows of an object that holds lists of equal length, one list for each key.

    Raises:
        InvalidRequestError: The lists are of different lengths.
    """
    columns = [fields.values.get(key) for key in keys]
    lists = [value if isinstance(value, list) else [value] for value in columns]
    if len({len(column) for column in lists}) != 1:
        counts = ", ".join(f"{key} {len(c)}" for key, c in zip(keys, lists, strict=True))
        raise InvalidRequestError(
            f"field '{fields.path}' must hold lists of equal length, got {counts}"
        )
    rows = zip(*lists, strict=True)
    return [
        Fields(dict(zip(keys, row, strict=True)), f"{fields.path}[{i}]")
        for i, row in enumerate(rows)
    ]


def one_hop(fields: Fields) -> list[Probe]:
    """The one-hop question that published portability files add to a record."""
    if "portability" not in fields:
        return []
    hop = fields.fields("portability")
    answer = (hop.text("New Answer"),)
    return [Probe("portability", hop.text("New Question"), answer, "one_hop")]


def personas_and_hops(fields: Fields, answer: str) -> list[Probe]:
    """The question as somebody would put it, and a question over several facts."""
    found = [Probe("portability", text, (answer,), "personas") for text in fields.texts("personas")]
    if "mhop" in fields and (answers := answers_of(fields, "mhop_ans")):
        found.append(Probe("portability", fields.text("mhop"), answers, "multi_hop"))
    return found
