"""One scored example as ``results.jsonl`` holds it, from which all metrics are computed.

It is plain data: the numbers of ``results.json`` follow from ``results.jsonl`` without a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import ProbeKind

_STAGE = re.compile(r"immediate|final|after_\d+")


class ProbeReading(TypedDict, total=False):
    """Measurements of one probe on one state of the model; those of plug-ins stand beside these.

    A value that was not measured is absent or ``None``; metrics then leave the probe out.
    """

    tf_tok: float | None  # share of the preferred answer's tokens that are arg-max
    tf_all: bool | None  # every answer token is arg-max, for any accepted answer
    log_prob: float | None  # mean log-probability of the preferred answer's tokens
    contrast_log_prob: float | None  # the same of the contrast answer
    text: str | None  # greedy free generation up to the model's own stop
    top1: list[int] | None  # arg-max ids at the answer positions, or along the base continuation
    kl: float | None  # KL(base || this state), mean over positions


class ProbeRecord(TypedDict):
    """One probe with its readings: unedited model, model before this edit, model after it.

    ``base`` and ``before`` differ only in sequential runs.
    """

    kind: ProbeKind
    group: str
    prompt: str
    answers: list[str]
    contrast: str | None
    task: NotRequired[Mapping[str, Any]]  # see `ProbeTask`; absent for most probes
    base: ProbeReading
    before: ProbeReading
    after: ProbeReading


class ExampleRecord(TypedDict):
    """One example scored at one stage.

    ``stage`` is ``immediate`` (right after its own edit), ``after_n`` (after n edits) or
    ``final``.  ``subject`` names the cluster for confidence intervals.  ``edit``, ``timing`` and
    ``memory`` hold costs as numbers by name, such as ``{"edit_seconds": 1.2}``.
    """

    id: str
    stage: str
    probes: list[ProbeRecord]
    subject: NotRequired[str | None]
    edit: NotRequired[Mapping[str, float | None]]
    timing: NotRequired[Mapping[str, float | None]]
    memory: NotRequired[Mapping[str, float | None]]


def stage_prefix(record: ExampleRecord) -> str:
    """Prefix of the result keys of a record's stage.

    Raises:
        InvalidRequestError: The stage is none of the known ones.

    >>> stage_prefix({"id": "1", "stage": "immediate", "probes": []})
    ''
    >>> stage_prefix({"id": "1", "stage": "after_100", "probes": []})
    'after_100/'
    """
    if not _STAGE.fullmatch(stage := record["stage"]):
        rule = "field 'stage' must be immediate, final or after_<count>"
        raise InvalidRequestError(f"example {record['id']!r}: {rule}, got {stage!r}")
    return "" if stage == "immediate" else f"{stage}/"
