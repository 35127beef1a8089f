"""What a method needs of its data, what it can do, and its settings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError, article_list
from kedit_lightning.registry import entries
from kedit_lightning.requests import EditExample, EditRequest, Probe, ProbeKind

#: What a method may need of every request, or of the examples it is fitted on.
Need: TypeAlias = Literal["subject", "target_old", "task", "rephrases", "locality"]

#: Probes that answer a need of ``fit``.
_PROBES: dict[Need, ProbeKind] = {"rephrases": "rephrase", "locality": "locality"}


@dataclass(frozen=True)
class Capabilities:
    """What a method can do.

    Args:
        batch: Writes several facts in one computation; otherwise they are written one by one.
        sequential: Keeps earlier edits in force while it writes new ones.
        quantised: Works on weights that are quantised.
        encoder_decoder: Works on models with an encoder and a decoder.
        adapter: Its edits can be exported as a LoRA adapter.
        weights: Its edits can be exported as a full model.
    """

    batch: bool = True
    sequential: bool = True
    quantised: bool = True
    encoder_decoder: bool = False
    adapter: bool = False
    weights: bool = False

    def check_base(self, name: str, base: BaseModel) -> None:
        """Check that a method can edit models of this kind.

        Args:
            name: Name of the method.
            base: The base model.

        Raises:
            UnsupportedUseError: It cannot.
        """
        if base.is_encoder_decoder and not self.encoder_decoder:
            raise UnsupportedUseError(
                f"{name} edits decoder-only models, and '{base.name}' has an encoder and a "
                "decoder; use a method whose row in the support matrix says so"
            )
        if getattr(base.model, "is_quantized", False) and not self.quantised:
            raise UnsupportedUseError(
                f"{name} cannot edit quantised weights; load '{base.name}' without quantization"
            )


@dataclass(frozen=True)
class MethodSettings:
    """Settings of a method: its constructor's parameters without the base model.

    A method has a dataclass of its own that lists them with their types; defaults stand in the
    constructor alone.  ``build`` replaces what was left to the base model by the values used.

    Args:
        seed: Seed of all random choices.
    """

    seed: int

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Read them from the parameters that the constructor got."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})


def missing_in_requests(requests: Sequence[EditRequest], needs: Collection[Need]) -> list[str]:
    """Clauses that name each request that lacks something, and the field."""
    fields: list[Need] = [f for f in ("subject", "target_old", "task") if f in needs]
    return [
        f"{request.label} lacks '{field}'"
        for request in requests
        for field in fields
        if getattr(request, field) is None
    ]


def missing_in_examples(examples: Sequence[EditExample], needs: Collection[Need]) -> list[str]:
    """Clauses that name each example that lacks probes that ``fit`` needs."""
    return [
        f"example '{example.id}' lacks '{need}'"
        for example in examples
        for need in sorted(_PROBES.keys() & needs)
        if not any(probe.kind == _PROBES[need] for probe in example.probes)
    ]


def refuse_images(name: str, items: Sequence[EditRequest | Probe]) -> None:
    """Refuse requests and probes about a picture, which no method uses yet.

    Raises:
        UnsupportedUseError: One of them has an image.
    """
    if seen := [item.label for item in items if item.image is not None]:
        raise UnsupportedUseError(
            f"{name} reads text only, and field 'image' is set in {article_list(seen)}; leave the "
            "field out, or take these records out of the data"
        )


def refuse_missing(name: str, missing: list[str]) -> None:
    """Refuse data that lacks what a method needs.

    Raises:
        MissingNeedsError: Something is missing.
    """
    if missing:
        raise MissingNeedsError(
            f"{name} needs more than the data gives: {article_list(missing)}; add it to the "
            "records, or choose a method that does without"
        )


def base_identity(base: BaseModel) -> dict[str, str]:
    """What a checkpoint holds of the base model that it was fitted on."""
    names = ("name", "fingerprint", "tokenizer_fingerprint")
    return {name: getattr(base, name) for name in names}


def warn_of_other_base(fitted_on: Mapping[str, str], base: Mapping[str, str]) -> None:
    """Warn when a checkpoint was fitted on another base model."""
    for field in ("fingerprint", "tokenizer_fingerprint"):
        if fitted_on and fitted_on[field] != base[field]:
            warnings.warn(
                f"the checkpoint was fitted on base model '{fitted_on['name']}', and its {field} "
                f"differs from that of '{base['name']}'; expect poor edits",
                stacklevel=3,
            )


def public_path(method: type[Any]) -> str:
    """Where a method is imported from: of those of this package, the public name.

    Checkpoints name it, so that they still load when a module has moved.
    """
    package, entry = "kedit_lightning.methods", entries("method").get(method.__name__)
    if entry is not None and entry.module.startswith(f"{package}.") and entry.load() is method:
        return f"{package}.{method.__name__}"
    return f"{method.__module__}.{method.__qualname__}"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON would hold them, so that a saved and a fresh edit compare equal."""
    result: dict[str, Any] = json.loads(json.dumps(values, sort_keys=True, default=str))
    return result
