"""What all edits share: where they come from, how they are applied, undone and named."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from kedit_lightning.errors import EditFileError, NonFiniteError, UnsupportedUseError
from kedit_lightning.requests import EditRequest

if TYPE_CHECKING:
    from types import TracebackType

    from kedit_lightning.edits.effects import Patch
    from kedit_lightning.edits.stack import EditStack


class EditableModel(Protocol):
    """What an edit needs of a base model."""

    @property
    def model(self) -> nn.Module:
        """The language model."""

    @property
    def name(self) -> str:
        """Its name in reports."""

    @property
    def fingerprint(self) -> str:
        """Short hash that tells base models apart."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """Short hash that tells tokenizers apart."""

    @property
    def edits(self) -> EditStack:
        """The edits now applied to it."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""

    @property
    def encoder(self) -> Any:
        """What turns texts into its tokens."""


@dataclass(frozen=True)
class EditOrigin:
    """Where an edit comes from.

    Args:
        method: Class name of the editing method.
        settings: The method's settings as plain values.
        requests: The facts it writes.
        base_model: Name of the base model.
        fingerprint: Fingerprint of the base model.
        tokenizer_fingerprint: Fingerprint of its tokenizer.
        stack: Ids of the edits it was computed on top of, in order.
        notes: Further facts worth keeping, such as which statistics were used.
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
        # As a file holds them, so that an edit and its saved copy are equal.
        for name in ("settings", "notes"):
            held = json.loads(json.dumps(dict(getattr(self, name)), default=str))
            object.__setattr__(self, name, held)
        for name in ("requests", "stack"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def to_json(self) -> dict[str, Any]:
        """Plain values for a file header."""
        values = asdict(self)
        for request in values["requests"]:
            for name in ("task", "image"):  # earlier releases had none; their edits keep their ids
                if request[name] is None:
                    del request[name]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EditOrigin:
        """Rebuild from :meth:`to_json`."""
        requests = tuple(EditRequest(**request) for request in values["requests"])
        return cls(**{**values, "requests": requests})


class Edit(ABC):
    """A reversible change of a base model.

    ``apply`` puts it on the base model's stack, ``rollback`` takes it off; both may be called
    twice.  Used as a context manager it is applied inside and rolled back outside.  The weights of
    the base model are never written to, so rolling back is exact to the last bit.
    """

    kind: ClassVar[str]
    #: Whether rows of one forward pass can carry different edits of this kind.
    rows_apart: ClassVar[bool] = True
    _kinds: ClassVar[dict[str, type[Edit]]] = {}

    def __init__(self, base: EditableModel, origin: EditOrigin | None = None) -> None:
        self.base = base
        self.origin = origin or EditOrigin()
        self._id: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            Edit._kinds[cls.kind] = cls

    # ---- what a kind defines

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values from which :meth:`from_state` rebuilds the edit."""

    @classmethod
    @abstractmethod
    def from_state(
        cls,
        base: EditableModel,
        origin: EditOrigin,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
    ) -> Edit:
        """Rebuild an edit from :meth:`state`."""

    def patches(self) -> dict[str, Patch]:
        """What the edit does to modules, by module name; nothing unless a kind says so."""
        return {}

    def parts(self) -> tuple[Edit, ...]:
        """The simple edits this one consists of: itself, unless it is composed."""
        return (self,)

    @property
    def requires_its_stack(self) -> bool:
        """Whether the edit only makes sense on the stack it was computed on."""
        return False

    @property
    def can_be_carried(self) -> bool:
        """Whether rows of one forward pass can carry this edit beside others."""
        return all(part.rows_apart for part in self.parts())

    def deltas(self) -> dict[str, Tensor]:
        """Change of each parameter, dense and in the parameter's own orientation.

        Raises:
            UnsupportedUseError: The edit changes no weights.
        """
        raise UnsupportedUseError(
            f"an edit of kind '{self.kind}' changes no weights, so it has no deltas; "
            "save it with edit.save(path) instead"
        )

    def materialise(self) -> nn.Module:
        """A copy of the base model with this edit written into its weights, for export."""
        from kedit_lightning.edits.export import materialise

        return materialise(self.base, [self])

    # ---- what all kinds share

    @property
    def id(self) -> str:
        """Hash of the edit's content: equal edits have equal ids, in any process."""
        if self._id is None:
            tensors, values = self.state()
            digest = hashlib.sha256()
            header = {"kind": self.kind, "values": values, "origin": self.origin.to_json()}
            digest.update(json.dumps(header, sort_keys=True, default=str).encode())
            for name in sorted(tensors):
                tensor = tensors[name].detach().cpu().contiguous()
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
            self._id = digest.hexdigest()[:16]
        return self._id

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
        return any(edit is self for edit in self.base.edits)

    def apply(self) -> Edit:
        """Put the edit on the stack; does nothing if it is there already."""
        if not self.applied:
            self.base.edits.push(self)
        return self

    def rollback(self) -> None:
        """Take the edit off the stack; does nothing if it is not there."""
        if self.applied:
            self.base.edits.remove(self)

    def __enter__(self) -> Edit:
        return self.apply()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.rollback()

    def save(self, path: str | Path) -> Path:
        """Write the edit to a safetensors file with a JSON header."""
        from kedit_lightning.edits.edit_file import save_edit

        return save_edit(self, Path(path))

    @staticmethod
    def load(path: str | Path, base: EditableModel, force: bool = False) -> Edit:
        """Read an edit for a base model; it is not applied yet.

        Args:
            path: File that :meth:`save` wrote.
            base: The base model to edit.
            force: Load it even if it was made for another base model.

        Raises:
            EditFileError: The file is absent, or no edit.
            BaseModelMismatchError: The edit was made for another base model.
        """
        from kedit_lightning.edits.edit_file import load_edit

        return load_edit(Path(path), base, force=force)

    def __repr__(self) -> str:
        facts = len(self.origin.requests)
        return f"<{type(self).__name__} {self.id} by {self.origin.method or 'hand'}, {facts} facts>"


def edit_class(kind: str) -> type[Edit]:
    """The class that reads edits of a kind.

    Raises:
        EditFileError: No class with that kind has been defined.
    """
    if kind not in Edit._kinds:
        raise EditFileError(
            f"unknown kind of edit '{kind}'; known are {', '.join(sorted(Edit._kinds))}"
        )
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
