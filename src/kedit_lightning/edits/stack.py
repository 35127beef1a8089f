"""The edits now applied to a base model, in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.effects import (
    AddToOutput,
    ChangeLogits,
    E,
    Effect,
    PromptFunction,
    ReadStates,
    RewritePrompt,
    RouteRows,
    families,
    of_type,
)
from kedit_lightning.edits.forward_hooks import ForwardHook, LogitsHook, ModuleHook, read_states
from kedit_lightning.edits.row_context import ContextTracker
from kedit_lightning.errors import EditOrderError, UnsupportedUseError

#: Rows, and the effects of the edit that they carry.
RowEffects: TypeAlias = tuple[list[int], Sequence[Effect]]


def _effects(edits: Sequence[Edit]) -> list[Effect]:
    return [effect for edit in edits for effect in edit.effects()]


def _by_module(effects: Sequence[Effect]) -> dict[str, list[Effect]]:
    """Effects on the output of modules, by module name."""
    modules: dict[str, list[Effect]] = {}
    for effect in effects:
        if isinstance(effect, (AddToOutput, RouteRows)):
            modules.setdefault(effect.module, []).append(effect)
    return modules


def _states_hooks(
    effects: Sequence[Effect], apart: Sequence[RowEffects], rows: int
) -> list[tuple[str, ForwardHook]]:
    """Hooks that read outputs of modules into the row context."""
    rows_of = {id(effect): at for at, carried in apart for effect in carried}
    hooks: list[tuple[str, ForwardHook]] = []
    for group in families(effects, ReadStates):
        carriers = None
        if any(id(effect) in rows_of for effect in group):
            carriers = torch.zeros(rows, len(group), dtype=torch.bool)
            for number, effect in enumerate(group):
                carriers[rows_of.get(id(effect), slice(None)), number] = True
        function = group[0].build([effect.content for effect in group], carriers)
        hooks.append((group[0].module, partial(read_states, function)))
    return hooks


class EditStack:
    """Ordered edits of one base model, oldest first.

    Hooks exist only while an edit is on the stack, and they are rebuilt from the edits alone at
    every change: there is no other state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._edits: list[Edit] = []
        self._carried: list[Edit | None] = []
        self._handles: list[RemovableHandle] = []
        self._prompts: list[PromptFunction] = []
        self._active = True
        self._reads_rows = False
        self._tracker = ContextTracker(model)

    def __iter__(self) -> Iterator[Edit]:
        return iter(tuple(self._edits))

    def __len__(self) -> int:
        return len(self._edits)

    def __getitem__(self, index: int) -> Edit:
        return self._edits[index]

    def __repr__(self) -> str:
        return f"EditStack({self._edits!r})"

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the applied edits, oldest first."""
        return tuple(edit.id for edit in self._edits)

    @property
    def active(self) -> bool:
        """Whether edits act now; inside :meth:`suspended` they do not."""
        return self._active and bool(self._edits or any(self._carried))

    @property
    def reads_rows(self) -> bool:
        """Whether an active edit looks at rows, so that passes must start at the first token."""
        return self._active and self._reads_rows

    def effects(self, kind: type[E]) -> list[E]:
        """Effects of one type that the applied edits have, oldest first."""
        return of_type(_effects(self._edits), kind)

    def push(self, edit: Edit) -> None:
        """Apply an edit on top.

        Raises:
            EditOrderError: The edit depends on the stack it was computed on, which is another.
        """
        self._check_origin(edit)
        self._change([*self._edits, edit])

    def _check_origin(self, edit: Edit) -> None:
        made_on = edit.origin.stack
        if edit.origin.method and made_on != self.ids:
            there, here = (", ".join(ids) or "no edits" for ids in (made_on, self.ids))
            if edit.requires_its_stack:
                raise EditOrderError(
                    f"edit {edit.id} by {edit.origin.method} depends on the edits it was computed "
                    f"on ({there}), but the stack holds {here}; apply those first, in that order, "
                    "or compute the edit again"
                )
            warnings.warn(
                f"edit {edit.id} by {edit.origin.method} was computed on top of {there}, and is "
                f"applied on top of {here}; its scores may differ from those reported for it",
                stacklevel=4,
            )

    def remove(self, edit: Edit) -> None:
        """Roll one edit back, wherever it stands."""
        self._change([other for other in self._edits if other is not edit])

    def clear(self) -> None:
        """Roll all edits back."""
        self._change([])

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the base model answers as if it had never been edited."""
        before, self._active = self._active, False
        try:
            yield
        finally:
            self._active = before

    @contextmanager
    def restored(self) -> Iterator[None]:
        """On leaving, the stack is as it was on entering, whatever happened inside."""
        before = list(self._edits)
        try:
            yield
        finally:
            if self._edits != before:
                self._change(before)

    @contextmanager
    def carried(self, edits: Sequence[Edit | None]) -> Iterator[None]:
        """Inside, each row of a forward pass carries its own edit, or ``None``, on the stack.

        Raises:
            UnsupportedUseError: An edit acts on prompts or on decoding, where rows are not told
                apart.
            EditOrderError: An edit depends on the stack it was computed on, which is another.
        """
        for edit in filter(None, dict.fromkeys(edits)):
            self._check_origin(edit)
            for part in edit.parts():
                if not part.rows_apart:
                    raise UnsupportedUseError(
                        f"edit {part.id} of kind '{part.kind}' acts on prompts or on decoding, "
                        "where rows are not told apart; apply it by itself"
                    )
        before, carried = self._carried, list(edits)
        self._change(self._edits, carried)
        try:
            yield
        finally:
            self._change(self._edits, before)

    @contextmanager
    def carried_by(self, rows: Sequence[int], of: int) -> Iterator[None]:
        """Inside, a forward pass has only these ``of`` so many rows that carry their own edits."""
        before = self._carried
        # Where edits were given for another number of rows, the forward pass refuses them.
        if len(before) != of or list(rows) == list(range(of)):
            yield
            return
        self._change(self._edits, [before[row] for row in rows])
        try:
            yield
        finally:
            self._change(self._edits, before)

    @contextmanager
    def prompts_end_at(self, columns: Tensor) -> Iterator[None]:
        """Inside, forward passes have prompts that end at these columns. Shape ``[batch]``."""
        before, self._tracker.prompt_ends = self._tracker.prompt_ends, columns
        try:
            yield
        finally:
            self._tracker.prompt_ends = before

    @contextmanager
    def logits_stand_at(self, places: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Inside, forward passes give logits of these rows and columns only. Shape ``[n]`` each."""
        before, self._tracker.logit_places = self._tracker.logit_places, places
        try:
            yield
        finally:
            self._tracker.logit_places = before

    def render(self, prompt: str, fits: Callable[[str], bool]) -> str:
        """The prompt as prompt edits rewrite it; ``fits``: a text leaves room for an answer."""
        for rewrite in self._prompts if self._active else ():
            prompt = rewrite(prompt, fits)
        return prompt

    def _change(self, edits: list[Edit], carried: list[Edit | None] | None = None) -> None:
        """Make ``edits`` the stack; on failure the old stack stays in force."""
        carried = self._carried if carried is None else carried
        rows_of: dict[Edit, list[int]] = {}
        for row, edit in enumerate(carried):
            if edit is not None:
                rows_of.setdefault(edit, []).append(row)
        shared = _effects(edits)
        apart = [(rows, edit.effects()) for edit, rows in rows_of.items()]
        every = [*shared, *(effect for _, effects in apart for effect in effects)]
        states = _states_hooks(every, apart, len(carried))
        hooks = [*self._module_hooks(shared, apart, len(carried)), *states]
        logits = of_type(every, ChangeLogits)
        if logits:
            hook = LogitsHook(logits)
            hooks += [*hook.readers(), ("", hook)]
        prompts = [
            group[0].build([effect.content for effect in group])
            for group in families(shared, RewritePrompt)
        ]
        for handle in self._handles:
            handle.remove()
        self._handles = [self._register(name, hook) for name, hook in hooks]
        decides = bool(apart or states or of_type(every, RouteRows))
        self._reads_rows = decides or bool(logits)
        if self._reads_rows:
            # After the other hooks, so that the context is still open when those of the model run.
            self._handles += self._tracker.register(with_encoder=bool(states), decides=decides)
        self._edits, self._carried, self._prompts = edits, carried, prompts

    def _module_hooks(
        self, shared: Sequence[Effect], apart: Sequence[RowEffects], rows: int
    ) -> list[tuple[str, ForwardHook]]:
        """Hooks that change outputs of modules."""
        on_all = _by_module(shared)
        on_some = [(at, _by_module(effects)) for at, effects in apart]
        hooks: list[tuple[str, ForwardHook]] = []
        for name in dict.fromkeys(name for on in (on_all, *(m for _, m in on_some)) for name in on):
            carried = [(at, modules[name]) for at, modules in on_some if name in modules]
            module = self._model.get_submodule(name)
            hook = ModuleHook(module, on_all.get(name, []), carried, rows if carried else 0)
            hooks.append((name, hook))
        return hooks

    def _register(self, name: str, hook: ForwardHook) -> RemovableHandle:
        def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return hook(args, output, self._tracker.current) if self._active else None

        return self._model.get_submodule(name).register_forward_hook(call)
