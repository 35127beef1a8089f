"""Facts for ``Requests`` from the arguments, or the records, of an edit with EasyEdit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedit_lightning.cli.messages import UsageError
from kedit_lightning.data.field_names import misspelt

#: What EasyEdit takes where no old answer is given.
_NO_ANSWER = "<|endoftext|>"
#: Fields of a record, or lists of them, and ours.
_FIELDS = {
    "prompt": "prompt",
    "prompts": "prompt",
    "target_new": "target_new",
    "subject": "subject",
    "ground_truth": "target_old",
    "case_id": "id",
    "rephrase_prompt": "rephrases",
    "rephrase_prompts": "rephrases",
    "image": "image",
}
_GROUPS = {
    "locality": "locality",
    "locality_inputs": "locality",
    "portability": "portability",
    "portability_inputs": "portability",
}
#: Prompts that must stay, one for a record: EasyEdit's WISE trains on them.
_UNRELATED = ("loc_prompt", "loc_prompts")


def is_request_list(values: Any) -> bool:
    """Whether a file holds arguments of an edit, or records, rather than settings."""
    first = values[0] if isinstance(values, list) and values else values
    return isinstance(first, Mapping) and "target_new" in first and "alg_name" not in first


def converted_requests(values: Any) -> list[dict[str, Any]]:
    """Records of ``Requests``.

    Args:
        values: A list of records (prompt, target_new, ground_truth, locality, ...), or the
            arguments of an edit (prompts, target_new, ground_truth, locality_inputs, ...).

    Raises:
        UsageError: A field is unknown, or a list is too short.
    """
    if isinstance(values, Mapping):
        return _of_arguments(values)
    return [_record(record, f"record {index}") for index, record in enumerate(values)]


def _record(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise UsageError(f"{place} must be an object with fields, got {record!r}")
    fact: dict[str, Any] = {}
    for key, value in record.items():
        if value is None or (key == "ground_truth" and value == _NO_ANSWER):
            continue
        if key in _GROUPS:
            if not isinstance(value, Mapping):
                raise UsageError(f"{place}: {key} must be an object of groups, got {value!r}")
            groups = {name: _probes(item, f"{place}, {key}.{name}") for name, item in value.items()}
            fact.setdefault(_GROUPS[key], {}).update({n: p for n, p in groups.items() if p})
        elif key in _UNRELATED:
            fact.setdefault("locality", {})["unrelated"] = [{"prompt": value}]
        elif key in _FIELDS:
            fact[_FIELDS[key]] = str(value) if key == "case_id" else value
        else:
            near = misspelt(key, [*_FIELDS, *_GROUPS, *_UNRELATED])
            hint = f"; was '{near}' meant?" if near else ""
            raise UsageError(f"{place}: there is no place for the field '{key}' here{hint}")
    old = fact.get("target_old")
    if isinstance(old, list):
        fact["target_old"] = old[0] if old else None
    return {key: value for key, value in fact.items() if value not in (None, {}, [])}


def _probes(item: Any, place: str) -> list[dict[str, Any]]:
    """Probes of a group; one or several prompts, each with an answer or a list of them."""
    if isinstance(item, list):  # of objects
        return [probe for one in item for probe in _probes(one, place)]
    if not isinstance(item, Mapping) or "prompt" not in item:
        raise UsageError(f"{place} must hold prompt and ground_truth, got {item!r}")
    prompts, answers = item["prompt"], item.get("ground_truth")
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    answers = [None] * len(prompts) if answers is None else _listed(answers)
    if len(answers) != len(prompts):
        raise UsageError(f"{place} has {len(prompts)} prompts and {len(answers)} answers")
    return [
        {"prompt": prompt, **({} if answer is None else {"answers": _flat(answer)})}
        for prompt, answer in zip(prompts, answers, strict=True)
        if prompt is not None
    ]


def _flat(answer: Any) -> list[str]:
    """Accepted answers; some files have a list of lists.

    >>> _flat("Rome"), _flat([["Rome", "Roma"]])
    (['Rome'], ['Rome', 'Roma'])
    """
    if not isinstance(answer, list):
        return [str(answer)]
    return [text for part in answer for text in _flat(part)]


def _of_arguments(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    lists = {key: _listed(value) for key, value in values.items() if key not in _GROUPS}
    prompts = lists.get("prompts") or lists.get("prompt") or []
    for key, items in lists.items():
        if len(items) != len(prompts) and key not in _UNRELATED:
            raise UsageError(f"{key} has {len(items)} items for {len(prompts)} prompts")
    records: list[dict[str, Any]] = [
        {key: items[index % len(items)] for key, items in lists.items() if items}
        for index in range(len(prompts))
    ]
    for key in values.keys() & _GROUPS.keys():
        for name, item in (values[key] or {}).items():
            for record, part in zip(records, _split(item, len(records), key, name), strict=True):
                if part["prompt"] is not None:
                    record.setdefault(key, {})[name] = part
    return [_record(record, f"request {index}") for index, record in enumerate(records)]


def _split(item: Mapping[str, Any], count: int, key: str, name: str) -> list[dict[str, Any]]:
    """The part of a group that belongs to each request."""
    prompts, answers = _listed(item["prompt"]), _listed(item.get("ground_truth"))
    answers = answers or [None] * count
    if not len(prompts) == len(answers) == count:
        raise UsageError(
            f"{key}.{name} has {len(prompts)} prompts and {len(answers)} answers for {count} "
            "requests; EasyEdit takes one of each for a request, null where there is none"
        )
    return [{"prompt": p, "ground_truth": a} for p, a in zip(prompts, answers, strict=True)]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
