"""Where an edit comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.requests import EditRequest

#: The note that holds the probability of each request's target under the edit.
TARGET_PROBABILITIES = "target_probabilities"


@dataclass(frozen=True)
class EditOrigin:
    """Where an edit comes from: method, settings and requests, base model and stack.

    Args:
        method: Class name of the editing method.
        settings: The method's settings as plain values.
        stack: Ids of the edits it was computed on top of, in order.
        notes: Further facts, such as which statistics were used; ``target_probabilities`` has one
            number a request.
    """

    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[EditRequest, ...] = ()
    base_model: str = ""
    fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    stack: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # In the form of a file, so that an edit and its saved copy are equal.
        for name in ("settings", "notes"):
            plain = json.loads(json.dumps(dict(getattr(self, name)), default=str))
            object.__setattr__(self, name, plain)
        for name in ("requests", "stack"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file header."""
        values = asdict(self)
        for request in values["requests"]:
            for name in ("task", "image"):  # earlier releases had none; their edits keep their ids
                if request.get(name) is None:
                    request.pop(name, None)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EditOrigin:
        """Rebuild from :meth:`to_json`.

        Raises:
            EditFileError: A field is absent, unknown, or of another type.
        """
        check_value("its origin", values, cls)
        requests = tuple(EditRequest.recorded(**request) for request in values["requests"])
        return cls(**{**values, "requests": requests})
