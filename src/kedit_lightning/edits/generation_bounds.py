"""Where prompts end in ``generate`` of transformers, while edits decide there."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from kedit_lightning.edits.row_context import ContextTracker


class BoundedGenerate:
    """What ``model.generate`` is while edits decide at the end of a prompt: it tells them the end.

    The calls that ``generate`` makes do not: chunks of a prompt, guesses of an assistant, and steps
    without a key-value cache all look alike.

    Args:
        model: The edited model.
        tracker: Its row contexts.
        own: A ``generate`` that this model had instead of that of its class.
    """

    def __init__(self, model: nn.Module, tracker: ContextTracker, own: Any = None) -> None:
        self._model = model
        self._tracker = tracker
        self._own = own

    @classmethod
    def attach(cls, model: nn.Module, tracker: ContextTracker | None) -> None:
        """Put it in place of the model's own ``generate``, or away if there is no tracker."""
        held = vars(model)
        own = held.get("generate")
        if isinstance(own, cls):
            own = own._own
        if tracker is not None and hasattr(type(model), "generate"):
            held["generate"] = cls(model, tracker, own)
        elif own is not None:
            held["generate"] = own
        else:
            held.pop("generate", None)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Generate as the model's own method does."""
        model: Any = self._model
        tracker = self._tracker
        before = tracker.prompt_columns, tracker.answers
        if tracker.prompt_columns is None:
            tracker.prompt_columns = _prompt_columns(args, options)
        # What an assistant guesses is checked by the model that it assists, which may be itself.
        if getattr(options.get("generation_config"), "is_assistant", False):
            tracker.answers = False
        try:
            if self._own is not None:
                return self._own(*args, **options)
            return type(model).generate(model, *args, **options)
        finally:
            tracker.prompt_columns, tracker.answers = before

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedGenerate:
        tracker = memo.get(id(self._tracker), self._tracker)
        return BoundedGenerate(
            memo.get(id(self._model), self._model), tracker, copy.deepcopy(self._own, memo)
        )


def _prompt_columns(args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """Columns of the prompts in a call of ``generate``; 1 where it makes them up.

    Behind a filled cache the new tokens alone may be given, with the mask of all.
    """
    names = ("inputs", "input_ids", "inputs_embeds", "attention_mask")
    given = [*args[:1], *(options.get(name) for name in names)]
    return max((value.shape[1] for value in given if isinstance(value, Tensor)), default=1)
