"""The edits now applied to a base model, in order."""

from __future__ import annotations

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kedit_lightning.edits.compilation import forget_compiled_code
from kedit_lightning.edits.edit import Edit, EditableModel
from kedit_lightning.edits.effects import E, RouteRows, of_type
from kedit_lightning.edits.folded_prefix import FoldedPrefix
from kedit_lightning.edits.forward_hooks import EntryHook, StackHook, drop_hooks, stack_hooks
from kedit_lightning.edits.generation_bounds import BoundedGenerate
from kedit_lightning.edits.hook_plan import HookPlan, effects_of
from kedit_lightning.edits.projections import have_moved, places_of, warn_of_moved
from kedit_lightning.edits.prompt_rewriting import rewritten
from kedit_lightning.edits.row_context import ContextTracker, RowContext
from kedit_lightning.edits.saved_weights import EditedSave
from kedit_lightning.edits.stack_chain import StackChain, StackMark
from kedit_lightning.edits.stack_order import check_carried, check_order, common_beginning
from kedit_lightning.errors import UnsupportedUseError, article_list

#: The stack of each model, as long as a base model or a hook holds it.
_STACKS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[EditStack]] = weakref.WeakKeyDictionary()
Carried: TypeAlias = list[Edit | None]


class EditStack:
    """Ordered edits of one model, oldest first, which all base models on that model share.

    Hooks exist only while an edit is on the stack, and they are rebuilt from the edits alone at
    every change: there is no other state.  Blocks and changes hold ``lock``, so that another thread
    waits until a pass is over.

    A module put in the place of a changed one is noticed, and said, by the next call of the model.

    Args:
        model: The model; :meth:`of` gives the stack that it has already.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._edits: list[Edit] = []
        self._chain, self._prefix, self._members = StackChain(), FoldedPrefix(model), set[Edit]()
        self._carried: Carried = []
        self._handles: list[RemovableHandle] = []
        self._hooked: list[nn.Module] = []
        self._places = places_of(model, [])
        self._silent: frozenset[Hashable] = frozenset()
        self._active, self.lock = True, threading.RLock()
        self._plan, self._tracker = HookPlan(), ContextTracker(model)

    @classmethod
    def of(cls, model: nn.Module) -> EditStack:
        """The stack of a model: the one that its hooks lead to, or that another base model has.

        Raises:
            UnsupportedUseError: A part of the model, or a model that it is a part of, is edited.
        """
        hooked = (hook.stack for hook in stack_hooks(model))
        stack = next((s for s in hooked if isinstance(s, cls) and s._model is model), None)
        known = _STACKS.get(model)
        if stack is None and known is not None:
            stack = known()
        if stack is None:  # one that is empty is false
            stack = cls(model)
        stack.check_alone()
        _STACKS[model] = weakref.ref(stack)
        return stack

    def adopt(self, base: EditableModel, silently: bool = False) -> None:
        """Take over the edits that a model carried when a base model was made of it.

        Those of a copied model are rebuilt, since they belong to the one it was copied from.
        """
        if self._edits and any(edit.base.edits is not self for edit in self._edits):
            edits = [e if e.base.edits is self else e.rebuilt_on(base) for e in self._edits]
            self._change(edits, [])
        if self._edits and not silently:
            warnings.warn(
                f"the model of '{base.name}' carries {self.described}, applied through another "
                "base model or before it was copied; they are on the stack of this one too: "
                "base.edits lists them, base.edits.clear() rolls them back",
                stacklevel=3,
            )

    def check_alone(self) -> None:
        """Make sure that no other stack acts on the model or a part of it.

        Raises:
            UnsupportedUseError: The message names the module and the edits.
        """
        for hook in stack_hooks(self._model):
            if hook.stack is not self:
                raise UnsupportedUseError(
                    f"a part of this model carries {hook.stack.described}, which are not on its "
                    "stack, so that it would be taken for unedited; roll them back through the "
                    "base model that they were applied to, and apply them here if you need them"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> EditStack:
        model = memo.get(id(self._model))
        if model is None:  # a part of the model is copied by itself, and keeps what acts on it
            return self
        twin = memo[id(self)] = copy.copy(self)
        twin._model, twin._active, twin.lock = model, True, threading.RLock()
        twin._tracker = copy.deepcopy(self._tracker, memo)
        twin._handles, twin._places = copy.deepcopy(self._handles, memo), []
        return twin

    def __copy__(self) -> EditStack:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._chain, twin._members = StackChain(), set(self._members)
        return twin

    def __reduce__(self) -> Any:
        if self._edits:
            return StackHook(self, lambda *call: None).__reduce__()
        return EditStack.of, (self._model,)

    def __iter__(self) -> Iterator[Edit]:
        return iter(tuple(self._edits))

    def __contains__(self, edit: object) -> bool:
        return edit in self._members

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
    def mark(self) -> StackMark:
        """What an edit that is computed now says of those below it, in a size that never grows."""
        return self._chain.follow(self._edits)

    @property
    def described(self) -> str:
        """How many edits there are, and their ids, for messages."""
        applied = list(dict.fromkeys([*self._edits, *filter(None, self._carried)]))
        return f"{len(applied)} edit(s) ({article_list([edit.id for edit in applied], 3)})"

    @property
    def context(self) -> RowContext | None:
        """The row context of the call that runs now."""
        return self._tracker.current

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that the edits act on."""
        return tuple(self._plan.names)

    @property
    def active(self) -> bool:
        """Whether edits act now; inside :meth:`suspended` they do not."""
        return self._active and bool(self._edits or any(self._carried))

    @property
    def reads_prompts(self) -> bool:
        """Whether an active edit looks at prompts, so that passes must start at their beginning."""
        return self._active and self._plan.reads_prompts

    @property
    def spares_heads(self) -> bool:
        """Whether the active edits do nothing before the last token of a prompt."""
        return self.active and self._plan.spares_heads

    def effects(self, kind: type[E]) -> list[E]:
        """Effects of one type that the applied edits have, oldest first; row functions folded."""
        effects = self._prefix.effects if kind is RouteRows else effects_of(self._edits)
        return of_type(effects, kind)

    def push(self, edit: Edit) -> None:
        """Apply an edit on top.

        Raises:
            EditOrderError: The edit depends on the stack it was computed on, which is another.
        """
        check_order(edit, self.mark)
        self._change([*self._edits, edit], same=len(self._edits))

    def remove(self, edit: Edit) -> None:
        """Roll one edit back, wherever it stands."""
        at = len(self._edits) - 1 if self._edits[-1] is edit else self._edits.index(edit)
        self._change(self._edits[:at] + self._edits[at + 1 :], same=at)

    def clear(self) -> None:
        """Roll all edits back."""
        self._change([])

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, the base model answers as if it had never been edited."""
        with self.lock:
            before, self._active = self._active, False
            self._tracker.acts = False
            forget_compiled_code(self._model)
            try:
                yield
            finally:
                self._active = self._tracker.acts = before
                forget_compiled_code(self._model)

    @contextmanager
    def without(self, family: Hashable) -> Iterator[None]:
        """Inside, one family of row functions is silent: a memory that learns replaces itself."""
        with self.lock:
            before = self._silent
            if all(effect.family != family for effect in self.effects(RouteRows)):
                yield
                return
            self._silent = before | {family}
            try:
                self._change(self._edits)
                yield
            finally:
                self._silent = before
                self._change(self._edits)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """On leaving, the stack is as it was on entering, whatever happened inside."""
        with self.lock:
            before = self._edits
            try:
                yield
            finally:
                if self._edits is not before:
                    self._change(before)

    @contextmanager
    def carried(self, edits: Sequence[Edit | None]) -> Iterator[None]:
        """Inside, each row of a forward pass carries its own edit, or ``None``, on the stack.

        Raises:
            UnsupportedUseError: An edit acts on prompts or on decoding, where rows are not told
                apart.
            EditOrderError: An edit depends on the stack it was computed on, which is another.
        """
        check_carried([edit for edit in edits if edit is not None], self.mark)
        with self.lock:
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
    def prompts_end_at(self, columns: Tensor, here: bool = False) -> Iterator[None]:
        """Inside, forward passes have prompts that end at these columns. Shape ``[batch]``.

        They are those of all that is read, or ``here`` of each call, whatever its cache holds.
        """
        with self.lock, self._tracker.told(prompt_ends=columns, ends_here=here):
            self.follow_modules()
            yield

    @contextmanager
    def logits_stand_at(self, places: tuple[Tensor, Tensor]) -> Iterator[None]:
        """Inside, forward passes give logits of these rows and columns only. Shape ``[n]`` each."""
        with self.lock, self._tracker.told(logit_places=places):
            yield

    def render(self, prompt: str, room: Callable[[str], int], images: Sequence[str] = ()) -> str:
        """The prompt as prompt edits rewrite it; ``room`` counts the tokens left behind a text."""
        rewrites = self._plan.prompts if self._active else ()
        return rewritten(prompt, rewrites, room, images if rewrites else ())

    def follow_modules(self) -> None:
        """Move hooks to the modules that somebody has put in the place of hooked ones."""
        if not have_moved(self._places):
            return
        fresh = HookPlan.of(self._model, self._prefix.effects, self._carried, self._silent)
        self._plan, before = self._plan.renewed(fresh), self._hooked
        self._hooked = self._plan.modules(self._model)
        self._places = places_of(self._model, self._plan.names)
        moved = [n for n, module in enumerate(self._hooked) if module is not before[n]]
        if not moved:
            return
        warn_of_moved([self._plan.names[n] for n in moved], self.described)
        with self.lock:
            drop_hooks([self._hooked[n] for n in moved], self)
            for n in moved:  # hooks of the model itself stay: it may be inside a call
                self._handles[n].remove()
                self._handles[n] = self._hook(n)
            forget_compiled_code(self._model)

    def _hook(self, n: int) -> RemovableHandle:
        """Register one hook of the plan."""
        return self._hooked[n].register_forward_hook(StackHook(self, self._plan.hooks[n][1]))

    def _change(self, edits: list[Edit], carried: Carried | None = None, same: int = -1) -> None:
        """Make ``edits`` the stack, whose lowest ``same`` stay; on failure the old one stays."""
        carried = self._carried if carried is None else carried
        same = common_beginning(self._edits, edits) if same < 0 else same
        prefix = FoldedPrefix(self._model, edits, self._prefix, same)
        plan = HookPlan.of(self._model, prefix.effects, carried, self._silent)
        with self.lock:
            for handle in self._handles:
                handle.remove()
            if have_moved(self._places):
                drop_hooks(self._model.modules(), self)
            self._members.difference_update(self._edits[same:])
            self._members.update(edits[same:])
            self._chain.keep(same)
            self._edits, self._carried, self._plan, self._prefix = edits, carried, plan, prefix
            self._hooked = plan.modules(self._model)
            self._places = places_of(self._model, plan.names)
            self._handles = [self._hook(n) for n in range(len(plan.hooks))]
            entries = [self._model, *self._tracker.encoders()] if plan.names else []
            self._handles += [e.register_forward_pre_hook(EntryHook(self)) for e in entries]
            if plan.reads_rows:
                # After the other hooks, so that the context is open when those of the model run.
                self._handles += self._tracker.register(plan.reads_states, plan.decides)
            BoundedGenerate.attach(self._model, self._tracker if plan.decides else None)
            EditedSave.attach(self._model, edits)
            forget_compiled_code(self._model)
