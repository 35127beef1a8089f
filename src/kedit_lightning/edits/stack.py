"""The edits now applied to a base model, in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.effects import (
    MemoryPatch,
    ModuleHook,
    Patch,
    RowsHook,
    known_context,
)
from kedit_lightning.edits.kinds.decoding import DecodingEdit
from kedit_lightning.edits.kinds.prompt.prompt_edit import PromptEdit, render_prompt
from kedit_lightning.edits.kinds.scope.scope_edit import ScopeMemory, scope_memories
from kedit_lightning.edits.row_context import ContextTracker
from kedit_lightning.errors import EditOrderError, UnsupportedUseError

if TYPE_CHECKING:
    from collections.abc import Callable


def _parts(edits: list[Edit]) -> list[Edit]:
    return [part for edit in edits for part in edit.parts()]


def _patches(edits: list[Edit]) -> dict[str, list[Patch]]:
    """What edits do, in their order, by module name."""
    patches: dict[str, list[Patch]] = {}
    for part in _parts(edits):
        for name, patch in part.patches().items():
            patches.setdefault(name, []).append(patch)
    return patches


class EditStack:
    """Ordered edits of one base model.

    Iterating gives the edits, oldest first.  Hooks exist only while an edit is on the stack, and
    they are rebuilt from the edits alone at every change: there is no other state.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._edits: list[Edit] = []
        self._carried: list[Edit | None] = []
        self._handles: list[RemovableHandle] = []
        self._active = True
        self._reads_rows = False
        self._tracker = ContextTracker(model)
        self._places: tuple[Tensor, Tensor] | None = None

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
        """Whether the edits act now; they do not inside :meth:`suspended`."""
        return self._active and bool(self._edits or any(self._carried))

    @property
    def reads_rows(self) -> bool:
        """Whether an edit that acts now looks at the rows, and so must see whole prompts."""
        return self._active and self._reads_rows

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
            if any(part.requires_its_stack for part in (edit, *edit.parts())):
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
        """Inside, each row of a forward pass carries an edit of its own on top of the stack.

        Args:
            edits: One for each row, ``None`` for rows that have none.

        Raises:
            UnsupportedUseError: An edit acts on prompts or on decoding, where rows are not told
                apart.
            EditOrderError: An edit depends on the stack it was computed on, which is another.
        """
        for edit in dict.fromkeys(edits):
            if edit is None:
                continue
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
    def prompts_end_at(self, columns: Tensor) -> Iterator[None]:
        """Tell memory edits where the prompts of the next forward passes end, ``[batch]``."""
        before, self._tracker.given = self._tracker.given, columns
        try:
            yield
        finally:
            self._tracker.given = before

    @contextmanager
    def logits_stand_at(self, places: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Tell edits that the next passes give logits of some rows and columns only, ``[n]``."""
        before, self._places = self._places, places
        try:
            yield
        finally:
            self._places = before

    def render(self, prompt: str, fits: Callable[[str], bool]) -> str:
        """The prompt as prompt edits rewrite it; the prompt itself when there are none."""
        if not self._active:
            return prompt
        return render_prompt(
            [p for p in _parts(self._edits) if isinstance(p, PromptEdit)], prompt, fits
        )

    def adjust_logits(self, logits: Tensor) -> Tensor:
        """Next-token logits ``[..., vocab]`` as decoding edits change them."""
        if self._active:
            for part in _parts(self._edits):
                if isinstance(part, DecodingEdit):
                    logits = part.adjust(logits)
        return logits

    def _change(self, edits: list[Edit], carried: list[Edit | None] | None = None) -> None:
        """Make ``edits`` the stack; on failure the old stack stays in force."""
        carried = self._carried if carried is None else carried
        shared, needs_rows = _patches(edits), any(carried)
        groups: dict[Edit, tuple[list[int], dict[str, list[Patch]]]] = {}
        for row, edit in enumerate(carried):
            if edit is not None:
                if edit not in groups:
                    groups[edit] = [], _patches([edit])
                groups[edit][0].append(row)
        hooks: dict[str, ModuleHook | RowsHook] = {}
        for name in dict.fromkeys([*shared, *(n for _, own in groups.values() for n in own)]):
            module, patches = self._model.get_submodule(name), shared.get(name, [])
            own = [(rows, mine[name]) for rows, mine in groups.values() if name in mine]
            hooks[name] = (
                RowsHook(module, len(carried), patches, own) if own else ModuleHook(module, patches)
            )
            needs_rows = needs_rows or any(isinstance(patch, MemoryPatch) for patch in patches)
        memories = scope_memories(self._model, edits, carried)
        needs_rows = needs_rows or bool(memories)
        for handle in self._handles:
            handle.remove()
        self._handles = [self._register(name, hook) for name, hook in hooks.items()]
        for memory in memories:
            self._handles += self._register_memory(memory)
        if memories and self._tracker.is_encoder_decoder:
            self._handles += self._follow_encoder()
        if needs_rows:
            enter, leave = self._tracker.enter, self._tracker.leave
            self._handles += [
                self._model.register_forward_pre_hook(enter, with_kwargs=True),
                self._model.register_forward_hook(leave, with_kwargs=True, always_call=True),
            ]
        self._edits, self._carried, self._reads_rows = edits, carried, needs_rows

    def _register(self, name: str, hook: ModuleHook | RowsHook) -> RemovableHandle:
        def call(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return hook(args, output, self._tracker.current) if self._active else None

        return self._model.get_submodule(name).register_forward_hook(call)

    def _follow_encoder(self) -> list[RemovableHandle]:
        encoder: nn.Module = self._model.get_encoder()  # type: ignore[operator]
        enter, leave = self._tracker.enter_encoder, self._tracker.leave_encoder
        return [
            encoder.register_forward_pre_hook(enter, with_kwargs=True),
            encoder.register_forward_hook(leave, always_call=True),
        ]

    def _register_memory(self, memory: ScopeMemory) -> list[RemovableHandle]:
        # Before the tracker's own hooks, so that the context is still open at the model's end.
        def decide(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._active:
                memory.decide(output, known_context(self._tracker.current))

        def answer(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            context = self._tracker.current
            if not self._active or context is None:
                return None
            return memory.answer(output, context, self._places)

        block = self._model.get_submodule(memory.module)
        return [block.register_forward_hook(decide), self._model.register_forward_hook(answer)]
