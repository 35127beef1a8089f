"""Several edits as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypedDict

from torch import Tensor

from kedit_lightning.edits.edit import Edit, EditableModel, Tensors, Values, edit_class
from kedit_lightning.edits.effects import Effect
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.state_schema import check_names, check_value


class _Member(TypedDict):
    kind: str
    values: dict[str, Any]
    origin: dict[str, Any]


class _Members(TypedDict):
    members: list[_Member]


class CompositeEdit(Edit):
    """Edits that are applied, rolled back and saved together, in the order they act."""

    kind: ClassVar[str] = "composite"

    def __init__(
        self, base: EditableModel, members: Sequence[Edit], origin: EditOrigin | None = None
    ) -> None:
        super().__init__(base, origin)
        self.members = tuple(members)

    def parts(self) -> tuple[Edit, ...]:
        """The simple edits of all members."""
        return tuple(part for member in self.members for part in member.parts())

    def effects(self) -> Sequence[Effect]:
        """The effects of all members."""
        return [effect for member in self.members for effect in member.effects()]

    def state(self) -> tuple[Tensors, Values]:
        """States of all members, told apart by their index."""
        tensors: dict[str, Tensor] = {}
        members = []
        for index, member in enumerate(self.members):
            parts, values = member.state()
            tensors |= {f"{index}/{name}": tensor for name, tensor in parts.items()}
            origin = member.origin.to_json()
            members.append({"kind": member.kind, "values": values, "origin": origin})
        return tensors, {"members": members}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> CompositeEdit:
        """Rebuild all members."""
        check_value("the composite", values, _Members)
        numbers = {str(index) for index in range(len(values["members"]))}
        others = [name for name in tensors if name.partition("/")[0] not in numbers]
        check_names("the composite", others, ())
        members = []
        for index, member in enumerate(values["members"]):
            start = f"{index}/"
            parts = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
            made_by = EditOrigin.from_json(member["origin"])
            kind = edit_class(member["kind"])
            members.append(kind.from_state(base, made_by, parts, member["values"]))
        return cls(base, members, origin)
