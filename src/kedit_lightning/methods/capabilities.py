"""What a method needs of its data, what it can do, and its settings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from numbers import Integral, Real
from sys import float_info
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args, get_type_hints

from kedit_lightning.base_models import BaseModel
from kedit_lightning.contradictions import contradictions, describe
from kedit_lightning.edits.weight_storage import quantisation_of
from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError, article_list
from kedit_lightning.registry import entries
from kedit_lightning.requests import EditExample, EditRequest, ProbeKind, trimmed_texts
from kedit_lightning.run_seed import run_seed

#: What a method may need of every request, or of the examples it is fitted on.
Need: TypeAlias = Literal["subject", "target_old", "task", "rephrases", "locality"]

#: Fields of a request, and kinds of probes, that answer a need.
_FIELDS: tuple[Need, ...] = ("subject", "target_old", "task")
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
        images: Reads the pictures of requests, on a vision-language model.
    """

    batch: bool = True
    sequential: bool = True
    quantised: bool = True
    encoder_decoder: bool = False
    adapter: bool = False
    weights: bool = False
    images: bool = False

    def check_base(self, name: str, base: BaseModel) -> None:
        """Check that the named method can edit models of this kind.

        Raises:
            UnsupportedUseError: It cannot.
        """
        if base.is_encoder_decoder and not self.encoder_decoder:
            raise UnsupportedUseError(
                f"{name} edits decoder-only models, and '{base.name}' has an encoder and a "
                "decoder; use a method whose row in the support matrix says so"
            )
        kind = None if self.quantised else quantisation_of(base.model)
        if kind is not None:
            raise UnsupportedUseError(
                f"{name} cannot edit quantised weights ({kind}); load '{base.name}' without "
                "quantization"
            )


@dataclass(frozen=True)
class Bounds:
    """Values that a number among the settings may have; stands beside its type.

    Args:
        least: Smallest value.
        most: Largest value; without one, the value must be finite.
        whole: Only whole numbers.
        above: ``least`` itself is out of bounds.
    """

    least: float
    most: float = float_info.max
    whole: bool = False
    above: bool = False

    def hold(self, value: object) -> bool:
        """Whether a value is a number within the bounds; NaN never is."""
        if not isinstance(value, Integral if self.whole else Real):
            return False
        return self.least <= float(value) <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.most == 1:
            return f"lie between {self.least:g} and 1" + ", without 0" * self.above
        if self.least == -float_info.max:
            return "be a finite number"
        kind = "whole number" if self.whole else "finite number" if self.most < inf else "number"
        return f"be a {kind} {'above' if self.above else 'of at least'} {self.least:g}"


Finite: TypeAlias = Annotated[float, Bounds(-float_info.max)]
Positive: TypeAlias = Annotated[float, Bounds(0, above=True)]
NotNegative: TypeAlias = Annotated[float, Bounds(0)]
NotNegativeOrInfinite: TypeAlias = Annotated[float, Bounds(0, inf)]
Share: TypeAlias = Annotated[float, Bounds(0, 1)]
PositiveShare: TypeAlias = Annotated[float, Bounds(0, 1, above=True)]
Count: TypeAlias = Annotated[int, Bounds(1, whole=True)]
CountOrZero: TypeAlias = Annotated[int, Bounds(0, whole=True)]


@dataclass(frozen=True)
class MethodSettings:
    """Parameters of a method's constructor, without the base model; defaults stand there alone.

    Each method has its own such class.  ``build`` resolves what was left to the base model.

    Args:
        seed: Seed of all random choices; that of the run when absent.
    """

    seed: int | None

    @property
    def start(self) -> int:
        """The seed, or else that of the run."""
        return run_seed() if self.seed is None else self.seed

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Read them from the parameters that the constructor got."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    def reported(self) -> dict[str, Any]:
        """Their values as results name them, with words where each edit settles one for itself."""
        return asdict(self)

    def check_bounds(self, method: str) -> None:
        """Check the numbers whose types state :class:`Bounds`; ``None`` stands for a default.

        Raises:
            UnsupportedUseError: Names each setting that is out of bounds, and its value.
        """
        wrong = [
            f"{name} must {bounds}, got {getattr(self, name)!r}"
            for name, hint in get_type_hints(type(self), include_extras=True).items()
            for kind in (hint, *get_args(hint))
            for bounds in getattr(kind, "__metadata__", ())
            if isinstance(bounds, Bounds)
            and not (type(None) in get_args(hint) and getattr(self, name) is None)
            and not bounds.hold(getattr(self, name))
        ]
        if wrong:
            raise UnsupportedUseError(f"{method}: {'; '.join(wrong)}")


def check_needs(
    name: str, records: Sequence[EditRequest | EditExample], needs: Collection[Need]
) -> None:
    """Make sure that requests have the fields, and examples the probes, that a method needs.

    Raises:
        MissingNeedsError: Names every record that lacks something, and the field or probe.
    """
    missing = []
    for record in records:
        if isinstance(record, EditRequest):
            lacking = [f for f in _FIELDS if f in needs and getattr(record, f) is None]
            missing += [f"{record.label} lacks '{field}'" for field in lacking]
        else:
            kinds = {probe.kind for probe in record.probes}
            lacking = [n for n in sorted(_PROBES.keys() & needs) if _PROBES[n] not in kinds]
            missing += [f"example '{record.id}' lacks '{need}'" for need in lacking]
    if missing:
        raise MissingNeedsError(
            f"{name} needs more than the data gives: {article_list(missing)}; add it to the "
            "records, or choose a method that does without"
        )


def warn_of_changes(given: Sequence[EditRequest], written: Sequence[EditRequest]) -> None:
    """Say which requests are not written since later ones contradict them, and which texts changed.

    Args:
        given: The requests as they were given.
        written: Those of them that are written.
    """
    if len(written) < len(given):
        clause = describe(given, contradictions(given))
        warnings.warn(f"{clause}; the last one is written", stacklevel=3)
    if texts := trimmed_texts(written):
        warnings.warn(texts, stacklevel=3)


def warn_of_other_base(fitted_on: Mapping[str, str], base: BaseModel) -> None:
    """Warn when a checkpoint was fitted on another base model; another precision is none."""
    same = fitted_on.get("weights_fingerprint") == base.weights_fingerprint
    for field in ("tokenizer_fingerprint",) if same else ("fingerprint", "tokenizer_fingerprint"):
        if fitted_on and fitted_on[field] != getattr(base, field):
            warnings.warn(
                f"the checkpoint was fitted on base model '{fitted_on['name']}', and its {field} "
                f"differs from that of '{base.name}'; expect poor edits",
                stacklevel=3,
            )


def public_path(method: type[Any]) -> str:
    """Import path of a method, as checkpoints name it: they still load when a module has moved."""
    package, entry = "kedit_lightning.methods", entries("method").get(method.__name__)
    if entry is not None and entry.module.startswith(f"{package}.") and entry.load() is method:
        return f"{package}.{method.__name__}"
    return f"{method.__module__}.{method.__qualname__}"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON would hold them, so that a saved and a fresh edit compare equal."""
    result: dict[str, Any] = json.loads(json.dumps(values, sort_keys=True, default=str))
    return result


def check_mode(name: str, can: Capabilities, mode: str) -> None:
    """Refuse a stream of edits for a method that cannot keep earlier ones.

    Raises:
        UnsupportedUseError: The protocol is ``sequential``, and the method is not.
    """
    if mode == "sequential" and not can.sequential:
        raise UnsupportedUseError(
            f"{name} cannot keep earlier edits in force while it writes new ones; use "
            "--trainer.protocol.mode single or batch"
        )
