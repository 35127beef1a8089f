"""Saving the weights of an edited model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kedit_lightning.edits.adapter_state import refuse_adapted
from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.materialisation import check_plain_weights, sum_of_deltas, with_delta
from kedit_lightning.edits.projections import find_module
from kedit_lightning.edits.weight_storage import loaded
from kedit_lightning.errors import UnsupportedUseError


class EditedSave:
    """What ``model.save_pretrained`` is while edits are applied: it saves the edited weights.

    Args:
        model: The edited model.
        edits: The edits that are applied.
    """

    def __init__(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        self._model = model
        self._edits = edits

    @classmethod
    def attach(cls, model: nn.Module, edits: Sequence[Edit]) -> None:
        """Put it in place of the model's own ``save_pretrained``, or away if there are no edits."""
        held = vars(model)
        if edits and hasattr(type(model), "save_pretrained"):
            held["save_pretrained"] = cls(model, edits)
        elif isinstance(held.get("save_pretrained"), cls):
            del held["save_pretrained"]

    def __call__(
        self,
        folder: Any,
        *args: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """Save as the model's own method does, with the edits added to the weights.

        Raises:
            UnsupportedUseError: An edit changes no weights, or the weights are quantised, or the
                model has adapters.
        """
        model: Any = self._model
        refuse_adapted(model, "save_pretrained")
        try:
            totals = sum_of_deltas(self._edits)
            check_plain_weights(model, self._edits[0].base.name)
        except UnsupportedUseError as error:
            raise UnsupportedUseError(
                f"save_pretrained cannot write the {len(self._edits)} applied edit(s) into weights "
                f"({error}); to save the model without them, roll them back first"
            ) from error
        state = dict(model.state_dict() if state_dict is None else state_dict)
        for name, delta in totals.items():
            if not state[name].is_meta:
                state[name] = with_delta(state[name], delta)
                continue
            owner, _, own = name.rpartition(".")
            with loaded(find_module(model, owner)) as module:
                state[name] = with_delta(module.get_parameter(own), delta).cpu()
        saved = type(model).save_pretrained(model, folder, *args, state_dict=state, **options)
        warnings.warn(
            f"the weights in {folder} hold the {len(self._edits)} edit(s) that are applied; to "
            "save the model without them, roll them back first",
            stacklevel=2,
        )
        return saved

    def __deepcopy__(self, memo: dict[int, Any]) -> EditedSave:
        return EditedSave(memo.get(id(self._model), self._model), self._edits)
