"""Callbacks with hooks for edits and for scored examples."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer

from kedit_lightning.edits import Edit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.metrics import ExampleRecord


class EditCallback(Callback):
    """A Lightning callback with four more hooks, which ``EditTrainer`` calls during a run.

    Lightning's own trainer calls none of them.

    Raises:
        UnsupportedUseError: A subclass defines a method ``on_…`` that is no hook of this class or
            Lightning's ``Callback``; raised by the class statement, with the nearest name.
    """

    #: Whether a subclass defines one of the hooks declared here.
    takes_edits: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.takes_edits = cls.takes_edits or not vars(cls).keys().isdisjoint(EDIT_HOOKS)
        hooks = [name for name in dir(EditCallback) if name.startswith("on_")]
        for name in dir(cls):
            if name.startswith("on_") and name not in hooks and callable(getattr(cls, name)):
                (nearest,) = difflib.get_close_matches(name, hooks, 1, cutoff=0.0)
                raise UnsupportedUseError(
                    f"{cls.__name__} defines {name}, which is no hook of a callback; was "
                    f"{nearest} meant? A method that is no hook needs a name without 'on_'"
                )

    def on_computed_edit(
        self, trainer: Trainer, method: LightningModule, name: str, edit: Edit
    ) -> None:
        """Called with an edit just computed, before it is saved, applied or told to any callback.

        A callback may raise :class:`~kedit_lightning.errors.StreamStopped` here, which ends a
        sequential run with or without this edit.
        """

    def on_edit(self, trainer: Trainer, method: LightningModule, name: str, edit: Edit) -> None:
        """Called with an edit just computed and its name in the run, before it is applied."""

    def on_example_result(
        self, trainer: Trainer, method: LightningModule, record: ExampleRecord, edit: Edit | None
    ) -> None:
        """Called with the record of an example just scored, as ``results.jsonl`` holds it.

        ``edit`` is what it was scored under; ``None`` at later stages of a sequential run.
        """

    def on_stream_checkpoint(self, trainer: Trainer, method: LightningModule, facts: int) -> None:
        """Called in a sequential run once the first ``facts`` of them stand on the stack.

        That is at each checkpoint of the protocol (``every``), before its facts are asked again,
        and at the end, which may come twice where it is a checkpoint too.
        """


#: The hooks that Lightning's ``Callback`` lacks.
EDIT_HOOKS = ("on_computed_edit", "on_edit", "on_example_result", "on_stream_checkpoint")


def announce(trainer: Trainer, hook: str, *told: Any) -> None:
    """Call one of these hooks on every callback that has them."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EditCallback):
            getattr(callback, hook)(trainer, trainer.lightning_module, *told)


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks with an edit hook that would never be called.

    Raises:
        UnsupportedUseError: A plain Lightning callback defines an edit hook.
    """
    for callback in callbacks:
        hooks = [hook for hook in EDIT_HOOKS if hasattr(callback, hook)]
        if hooks and not isinstance(callback, EditCallback):
            raise UnsupportedUseError(
                f"callback {type(callback).__name__} defines {hooks[0]}, a hook of EditCallback; "
                "derive it from kedit_lightning.benchmark.EditCallback"
            )
