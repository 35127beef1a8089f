"""Edits that add neurons beside MLPs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import ClassVar, TypedDict

from torch import Tensor

from kedit_lightning.edits.edit import EditableModel, MemoryEdit, Tensors, Values, check_finite
from kedit_lightning.edits.effects import Effect, RouteRows, RowFunction, contents_of
from kedit_lightning.edits.kinds.neurons.neurons import MLPPlace, Neurons
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.projections import check_editable, compute_dtype, projection_shape
from kedit_lightning.edits.row_context import RowContext
from kedit_lightning.edits.state_schema import (
    FULL_PRECISION,
    check_names,
    check_tensor,
    check_value,
)
from kedit_lightning.edits.weight_storage import device_of
from kedit_lightning.errors import EditFileError

_PARTS = tuple(field.name for field in fields(Neurons))


class _Values(TypedDict):
    places: list[list[str]]


class NeuronsEdit(MemoryEdit):
    """Neurons beside one MLP or a few; those of all applied edits at a place act together.

    They look at one token at a time, so nothing is decided for a row.
    """

    kind: ClassVar[str] = "neurons"

    def __init__(
        self,
        base: EditableModel,
        neurons: Mapping[MLPPlace, Neurons],
        origin: EditOrigin | None = None,
    ) -> None:
        super().__init__(base, origin)
        self.neurons = dict(neurons)
        for place, added in self.neurons.items():
            reads, writes = (check_editable(base.model, name) for name in place)
            d_in, d_out = projection_shape(reads)[0], projection_shape(writes)[1]
            n = len(added)
            shapes = ((n, d_in), (n,), (n, d_out), (None, d_in))
            for name, tensor, shape in zip(_PARTS, added.tensors, shapes, strict=True):
                check_tensor(f"{name} of '{place.writes}'", tensor, shape, FULL_PRECISION)
                check_finite(f"neurons' {name}", place.writes, tensor)

    @classmethod
    def family_of(cls, place: MLPPlace) -> Hashable:
        """The neurons that stand together at a place."""
        return (cls.kind, *place)

    def effects(self) -> Sequence[Effect]:
        """For each place, reading the input of the MLP and adding to its output."""
        effects: list[Effect] = []
        for place, neurons in self.neurons.items():
            steps = _NeuronsAt(self.base, place)
            family = self.family_of(place)
            effects += [
                RouteRows(place.reads, family, steps.reader, [neurons]),
                RouteRows(place.writes, family, steps.writer, [neurons]),
            ]
        return effects

    def state(self) -> tuple[Tensors, Values]:
        """The tensors of the neurons by the number of their place."""
        tensors = {
            f"{number}.{name}": tensor
            for number, neurons in enumerate(self.neurons.values())
            for name, tensor in zip(_PARTS, neurons.tensors, strict=True)
        }
        return tensors, {"places": [list(place) for place in self.neurons]}

    @classmethod
    def from_state(
        cls, base: EditableModel, origin: EditOrigin, tensors: Tensors, values: Values
    ) -> NeuronsEdit:
        """Rebuild the neurons of each place."""
        check_value("the edit", values, _Values)
        if any(len(place) != 2 for place in values["places"]) or not values["places"]:
            raise EditFileError("neurons stand at no place, or at one that is not two modules")
        places = [MLPPlace(*place) for place in values["places"]]
        names = [f"{number}.{name}" for number in range(len(places)) for name in _PARTS]
        check_names("the edit", tensors, names)
        neurons = {}
        for number, place in enumerate(places):
            parts = [tensors[f"{number}.{name}"] for name in _PARTS]
            check_tensor("biases", parts[1], (None,), FULL_PRECISION)
            neurons[place] = Neurons(*parts)
        return cls(base, neurons, origin)


class _NeuronsAt:
    """The two steps of the neurons at one place: activations at its input, values at its output."""

    def __init__(self, base: EditableModel, place: MLPPlace) -> None:
        self._base, self._place = base, place
        self._name = NeuronsEdit.family_of(place)

    def _joined(self, contents: Sequence[Neurons], module: str) -> Neurons:
        device = device_of(self._base.model.get_submodule(module))
        return Neurons.joined([neurons.to(device) for neurons in contents])

    def reader(self, contents: Sequence[Neurons]) -> RowFunction:
        """A function of the first projection that leaves the activations in the row context."""
        neurons = self._joined(contents, self._place.reads)

        def read(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
            dtype = compute_dtype(x.dtype)
            context.decisions[self._name] = neurons.to(dtype).activations(x.to(dtype))
            return y

        return read

    def writer(self, contents: Sequence[Neurons]) -> RowFunction:
        """A function of the last projection that adds the values of the neurons that fire."""
        neurons = self._joined(contents, self._place.writes)

        def write(x: Tensor, y: Tensor, context: RowContext) -> Tensor:
            # Taken out again: they belong to the tokens of this call alone.
            activations = context.decisions.pop(self._name)
            if not bool((activations > 0).any()):
                return y
            change = neurons.to(activations.dtype).change(activations.to(neurons.keys.device))
            return (y.to(change.dtype) + change).to(y.dtype)

        return write


def stacked_queries(base: EditableModel, place: MLPPlace) -> list[Tensor]:
    """Queries of the applied edits at a place, oldest first, ``[m, d_in]`` each."""
    family = NeuronsEdit.family_of(place)
    routes = [effect for effect in base.edits.effects(RouteRows) if effect.family == family]
    contents = contents_of(route for route in routes if route.module == place.reads)
    return [neurons.queries for neurons in contents]
