"""The base class of all edits: apply, roll back, save, load."""

from __future__ import annotations

import json
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from kedit_lightning.edits.edit_file import content_id, read_edit, write_edit
from kedit_lightning.edits.effects import AddToOutput, E, Effect, KeepMemory, of_type
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.materialisation import materialise
from kedit_lightning.edits.origin import (
    EditOrigin,
    IdentifiedModel,
    check_same_base,
    warn_of_other_weights,
)
from kedit_lightning.edits.projections import find_module
from kedit_lightning.edits.stack_chain import StackMark
from kedit_lightning.errors import (
    BaseModelMismatchError,
    EditFileError,
    KEditError,
    MissingExtraError,
    NonFiniteError,
    UnsupportedUseError,
)

Tensors: TypeAlias = dict[str, Tensor]
#: Plain values that JSON can hold.
Values: TypeAlias = dict[str, Any]


class AppliedEdits(Protocol):
    """The edits now applied to a base model, oldest first; see :class:`EditStack`."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Their ids."""

    @property
    def mark(self) -> StackMark:
        """What an edit that is computed now says of those below it."""

    def __iter__(self) -> Iterator[Edit]: ...

    def __contains__(self, edit: object) -> bool: ...

    def push(self, edit: Edit) -> None:
        """Apply an edit on top."""

    def remove(self, edit: Edit) -> None:
        """Roll one edit back."""

    def clear(self) -> None:
        """Roll all edits back."""

    def restored(self) -> AbstractContextManager[None]:
        """On leaving, the stack is as it was on entering."""

    def effects(self, kind: type[E]) -> list[E]:
        """Effects of one type, oldest first."""


class EditableModel(IdentifiedModel, Protocol):
    """The part of a base model that edits use."""

    model: nn.Module
    tokenizer: Any
    encoder: Any

    @property
    def dtype(self) -> torch.dtype:
        """Number type of its hidden states."""

    @property
    def edits(self) -> AppliedEdits:
        """The edits now applied to it."""

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        batch_size: int = 32,
        stop_at_sentence: bool = False,
        **options: Any,
    ) -> list[str]:
        """Continue prompts greedily."""


class Edit(ABC):
    """A reversible change of a base model; a context manager that applies it and rolls it back.

    A ``with`` block of an edit that is applied already leaves it applied.
    The weights of the base model are never written to, so rolling back is exact to the last bit.
    """

    kind: ClassVar[str]
    #: Whether rows of one forward pass can carry different edits of this kind.
    rows_apart: ClassVar[bool] = True
    _kinds: ClassVar[dict[str, type[Edit]]] = {}

    def __init__(self, base: EditableModel, origin: EditOrigin | None = None) -> None:
        self.base = base
        self.origin = origin or EditOrigin()
        #: What it was solved from, if that is kept: no part of the edit, nor of its file.
        self.equations: Tensors | None = None
        self._id: str | None = None
        #: Fingerprint of other weights than those it was made for, which the user let it act on.
        self._accepted_for: str | None = None
        #: For each ``with`` block that is open, whether the edit was applied before it.
        self._applied_before: list[bool] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Edit._kinds[cls.kind] = cls

    # ---- what a kind defines

    @abstractmethod
    def effects(self) -> Sequence[Effect]:
        """What the edit does to the base model, in the order it acts."""

    @abstractmethod
    def state(self) -> tuple[Tensors, Values]:
        """Tensors and plain values from which :meth:`from_state` rebuilds the edit."""

    @classmethod
    @abstractmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> Edit:
        """Rebuild an edit from :meth:`state`."""

    def parts(self) -> tuple[Edit, ...]:
        """The simple edits this one consists of: itself, unless it is composed."""
        return (self,)

    # ---- what all kinds share

    def deltas(self) -> dict[str, Tensor]:
        """Change of each parameter, dense and in the parameter's own orientation.

        Raises:
            UnsupportedUseError: A part of the edit changes no weights.
        """
        total: dict[str, Tensor] = {}
        for part in self.parts():
            for effect in part.effects():
                if isinstance(effect, AddToOutput):
                    module = find_module(self.base.model, effect.module)
                    is_expert = isinstance(module, ExpertProjection)
                    owner = module.owner if is_expert else effect.module
                    for name, delta in effect.delta.of_parameters(module).items():
                        key = f"{owner}.{name}"
                        total[key] = total[key] + delta if key in total else delta
                elif not isinstance(effect, KeepMemory):
                    raise UnsupportedUseError(
                        f"an edit of kind '{part.kind}' changes no weights, so it has no deltas; "
                        "save it with edit.save(path) instead"
                    )
        return total

    @property
    def requires_its_stack(self) -> bool:
        """Whether the edit was computed from the memories of the edits below it."""
        return bool(of_type(self.effects(), KeepMemory))

    @property
    def can_be_carried(self) -> bool:
        """Whether rows of one forward pass can carry this edit beside others."""
        return all(part.rows_apart for part in self.parts())

    @property
    def id(self) -> str:
        """Hash of the edit's content: equal edits have equal ids, in any process."""
        if self._id is None:
            tensors, values = self.state()
            self._id = content_id(self.kind, values, self.origin.to_json(), tensors)
        return self._id

    def note(self, **facts: Any) -> None:
        """Add facts to the notes of where it comes from; its id changes, so before it is used."""
        self.origin = replace(self.origin, notes={**self.origin.notes, **facts})
        self._id = None

    @property
    def nbytes(self) -> int:
        """Size of what the edit stores, in bytes."""
        tensors, values = self.state()
        return sum(t.numel() * t.element_size() for t in tensors.values()) + (
            len(json.dumps(values).encode()) if values else 0
        )

    @property
    def applied(self) -> bool:
        """Whether the edit is on the base model's stack."""
        return self in self.base.edits

    def apply(self) -> Edit:
        """Put the edit on the stack; does nothing if it is there already."""
        if not self.applied:
            if self._accepted_for is None or self._accepted_for != self.base.fingerprint:
                warn_of_other_weights(self.origin, self.base)
            self.base.edits.push(self)
        return self

    def rollback(self) -> None:
        """Take the edit off the stack; does nothing if it is not there."""
        if self.applied:
            self.base.edits.remove(self)

    def rebuilt_on(self, base: EditableModel) -> Edit:
        """The same edit for a base model on a copy of the model."""
        tensors, values = self.state()
        twin = self.from_state(base, self.origin, tensors, values)
        twin._accepted_for = self._accepted_for
        return twin

    def __enter__(self) -> Edit:
        before = self.applied
        self.apply()
        self._applied_before.append(before)
        return self

    def __exit__(self, *error: object) -> None:
        if not self._applied_before.pop():
            self.rollback()

    def materialise(self, dequantise: bool = False) -> nn.Module:
        """A copy of the base model with this edit written into its weights, for export.

        Quantised weights cannot hold it; with ``dequantise`` the copy is a plain model.
        """
        return materialise(self.base, [self], dequantise)

    def save(self, path: str | Path) -> Path:
        """Write the edit to a safetensors file with a JSON header."""
        tensors, values = self.state()
        origin = self.origin.to_json()
        header = {"kind": self.kind, "id": self.id, "origin": origin, "values": values}
        return write_edit(Path(path), header, tensors)

    @staticmethod
    def load(path: str | Path, base: EditableModel, force: bool = False) -> Edit:
        """Read what :meth:`save` wrote; the edit is not applied yet.

        Args:
            path: The file.
            base: The base model to edit.
            force: Load it even if it was made for another base model.

        Raises:
            EditFileError: The file is absent, no edit, or not what its id says.
            BaseModelMismatchError: The edit was made for another base model.
        """
        path = Path(path)
        header, tensors = read_edit(path)
        try:
            origin = EditOrigin.from_json(header["origin"])
            if not force:
                check_same_base(f"the edit in {path}", origin, base)
            edit = edit_class(header["kind"]).from_state(base, origin, tensors, header["values"])
            if edit.id != header["id"]:
                raise EditFileError("it holds what such an edit does not have")
        except (BaseModelMismatchError, MissingExtraError):
            raise
        except Exception as error:  # kinds of other packages fail on strange content in any way
            reason = str(error) if isinstance(error, KEditError) else repr(error)[:200]
            reason = reason.partition("\n")[0]
            raise EditFileError(
                f"{path} is no whole edit of kind {reprlib.repr(header['kind'])}, or does not fit "
                f"'{base.name}': {reason}"
            ) from error
        edit._accepted_for = base.fingerprint if force else None
        return edit

    def __repr__(self) -> str:
        facts = len(self.origin.requests)
        return f"<{type(self).__name__} {self.id} by {self.origin.method or 'hand'}, {facts} facts>"


class MemoryEdit(Edit):
    """An edit that decides row by row, at the last prompt token, whether it acts."""


#: Modules of kinds that take long to import, which happens when a file first names the kind.
LATE_KINDS: dict[str, str] = {}


def edit_class(kind: str) -> type[Edit]:
    """The class that reads edits of a kind.

    Raises:
        EditFileError: No class with that kind has been defined.
    """
    if kind not in Edit._kinds and kind in LATE_KINDS:
        import_module(LATE_KINDS[kind])
    if kind not in Edit._kinds:
        known = ", ".join(sorted({*Edit._kinds, *LATE_KINDS}))
        raise EditFileError(f"unknown kind of edit {reprlib.repr(kind)}; known are {known}")
    return Edit._kinds[kind]


def check_finite(quantity: str, layer: str, tensor: Tensor) -> Tensor:
    """Return the tensor if all of it is finite.

    Raises:
        NonFiniteError: It holds NaN or infinity; the message names the layer and the quantity.
    """
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(
            f"the {quantity} of layer '{layer}' has {bad} of {tensor.numel()} values that are NaN "
            "or infinite, so the edit is refused and nothing was changed; try a smaller learning "
            "rate, float32, or another layer"
        )
    return tensor
