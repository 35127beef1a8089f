"""Where an edit comes from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from kedit_lightning.edits.state_schema import check_value
from kedit_lightning.errors import BaseModelMismatchError
from kedit_lightning.requests import EditRequest

#: The note that holds the probability of each request's target under the edit.
TARGET_PROBABILITIES = "target_probabilities"


@dataclass(frozen=True)
class EditOrigin:
    """Where an edit comes from: method, settings and requests, base model and stack.

    Args:
        method: Class name of the editing method.
        settings: The method's settings as plain values.
        stack: Mark of the edits it was computed on top of (``stack_chain``); all their ids, in
            files of earlier releases.
        notes: Further facts, such as which statistics were used; ``target_probabilities`` has one
            number a request.
        full_fingerprint: Hash of all weights of the base model; earlier releases had none.
    """

    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    requests: tuple[EditRequest, ...] = ()
    base_model: str = ""
    fingerprint: str = ""
    tokenizer_fingerprint: str = ""
    stack: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    full_fingerprint: str = ""

    def __post_init__(self) -> None:
        # In the form of a file, so that an edit and its saved copy are equal.
        for name in ("settings", "notes"):
            plain = json.loads(json.dumps(dict(getattr(self, name)), default=str))
            object.__setattr__(self, name, plain)
        for name in ("requests", "stack"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def identity(self) -> tuple[str, ...]:
        """What tells its base model from others."""
        return self.fingerprint, self.tokenizer_fingerprint, self.full_fingerprint

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file header."""
        values = asdict(self)
        if not self.full_fingerprint:
            del values["full_fingerprint"]
        for request in values["requests"]:
            # Earlier releases had none of these; their edits keep their ids.
            for name in ("task", "image", "constraint_prompt", "constraint_answer"):
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


class IdentifiedModel(Protocol):
    """The part of a base model that tells which one it is."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Short hash of configuration and a sample of the weights."""

    @property
    def full_fingerprint(self) -> str:
        """Short hash of configuration and all weights."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """Short hash that tells tokenizers apart."""


def check_same_base(what: str, origin: EditOrigin, base: IdentifiedModel) -> None:
    """Refuse an edit that was made for another base model, other weights, or another tokenizer.

    Raises:
        BaseModelMismatchError: The message names both models.
    """
    parts = {
        "fingerprint": "base model",
        "tokenizer_fingerprint": "tokenizer",
        "full_fingerprint": "very weights",  # last, as it reads them all
    }
    for field_name, part in parts.items():
        made = getattr(origin, field_name)
        if made and made != (here := getattr(base, field_name)):
            raise BaseModelMismatchError(
                f"{what} was made for the {part} of '{origin.base_model}' (fingerprint {made}), "
                f"and this is '{base.name}' (fingerprint {here}); load that model, in the same "
                "dtype, or if you know that they agree, load the edit all the same: --force of "
                "`kedit predict`, force=True in Python"
            )


def warn_of_other_weights(origin: EditOrigin, base: IdentifiedModel) -> None:
    """Warn of an edit whose base model was trained, merged or cast since it was computed."""
    made = origin.fingerprint if origin.method else ""  # one made by hand is for any weights
    if made and made != (here := base.fingerprint):
        warnings.warn(
            f"an edit by {origin.method} was computed for other weights than '{base.name}' has now "
            f"(fingerprint {made}, now {here}); its scores may differ from those "
            "reported for it",
            stacklevel=3,
        )
