"""From edits to the hooks that apply them."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import nn

from kedit_lightning.edits.edit import Edit
from kedit_lightning.edits.effects import (
    AddToOutput,
    ChangeLogits,
    Effect,
    KeepMemory,
    PromptFunction,
    ReadStates,
    RewritePrompt,
    RouteRows,
    families,
    of_type,
)
from kedit_lightning.edits.expert_projection import ExpertProjection
from kedit_lightning.edits.forward_hooks import ForwardHook, LogitsHook, ModuleHook, read_states
from kedit_lightning.edits.projections import find_module
from kedit_lightning.edits.routed_hooks import ExpertsHook, expert_deltas

#: Rows, and the effects of the edit that they carry.
RowEffects: TypeAlias = tuple[list[int], Sequence[Effect]]


def effects_of(edits: Iterable[Edit]) -> list[Effect]:
    """Effects of edits, in the order they act."""
    return [effect for edit in edits for effect in edit.effects()]


def _heard(effects: Sequence[Effect], silent: Collection[Hashable]) -> list[Effect]:
    """The effects without the row functions of silent families."""
    return [e for e in effects if not (isinstance(e, RouteRows) and e.family in silent)]


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


def _module_hooks(
    model: nn.Module, shared: Sequence[Effect], apart: Sequence[RowEffects], rows: int
) -> list[tuple[str, ForwardHook]]:
    """Hooks that change outputs of modules."""
    on_all = _by_module(shared)
    on_some = [(at, _by_module(effects)) for at, effects in apart]
    hooks: list[tuple[str, ForwardHook]] = []
    experts: dict[str, dict[str, ExpertProjection]] = {}
    for name in dict.fromkeys(name for on in (on_all, *(m for _, m in on_some)) for name in on):
        carried = [(at, modules[name]) for at, modules in on_some if name in modules]
        module = find_module(model, name)
        if isinstance(module, ExpertProjection):
            experts.setdefault(module.owner, {})[name] = module
            continue
        hook = ModuleHook(module, on_all.get(name, []), carried, rows if carried else 0)
        hooks.append((name, hook))
    for owner, projections in experts.items():
        all_rows, *some = [
            expert_deltas([(p, on[n]) for n, p in projections.items() if n in on])
            for on in (on_all, *(modules for _, modules in on_some))
        ]
        apart_of = [(at, deltas) for (at, _), deltas in zip(on_some, some, strict=True) if deltas]
        held = next(iter(projections.values())).experts
        hooks.append((owner, ExpertsHook(held, all_rows, apart_of, rows if apart_of else 0)))
    return hooks


def _changes_weights_alone(hook: ForwardHook) -> bool:
    """Whether a hook only adds to the output what other weights would."""
    return isinstance(hook, ExpertsHook) or (isinstance(hook, ModuleHook) and not hook.routes)


@dataclass(frozen=True)
class HookPlan:
    """What a stack of edits does to a model.

    Args:
        hooks: Names of modules, and hooks on their outputs, in the order they act.
        prompts: Functions that rewrite prompts.
        reads_rows: Whether a hook tells rows apart.
        reads_prompts: Whether a hook looks at prompts or logits, so that passes must start at the
            first token.
        reads_states: Whether a hook reads hidden states, perhaps in the encoder.
        decides: Whether a hook decides at the end of the prompt, which one call must then read.
        spares_heads: Whether nothing acts before the last token of a prompt.
    """

    hooks: Sequence[tuple[str, ForwardHook]] = ()
    prompts: Sequence[PromptFunction] = ()
    reads_rows: bool = False
    reads_prompts: bool = False
    reads_states: bool = False
    decides: bool = False
    spares_heads: bool = False

    @property
    def names(self) -> list[str]:
        """Name of the module of each hook."""
        return [name for name, _ in self.hooks]

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The module that each hook is on.

        Where peft has put an adapter around it, changes of weights go inside, and so stay when the
        adapter is merged and taken off. All others see what the module and its adapter give.
        """
        return [
            find_module(model, name, adapted=not _changes_weights_alone(hook))
            for name, hook in self.hooks
        ]

    def renewed(self, fresh: HookPlan) -> HookPlan:
        """The same plan with hooks made anew where they depend on the module they are on.

        Readers of states stay, since other hooks use what they read.
        """
        pairs = zip(self.hooks, fresh.hooks, strict=True)
        stays = (partial, LogitsHook)
        return replace(
            self, hooks=[old if isinstance(old[1], stays) else new for old, new in pairs]
        )

    @classmethod
    def of(
        cls,
        model: nn.Module,
        effects: Sequence[Effect],
        carried: Sequence[Edit | None],
        silent: Collection[Hashable] = (),
    ) -> HookPlan:
        """The plan of effects on all rows, and of the edits that a row each carries.

        Row functions of the ``silent`` families are left out.
        """
        rows_of: dict[Edit, list[int]] = {}
        for row, edit in enumerate(carried):
            if edit is not None:
                rows_of.setdefault(edit, []).append(row)
        shared = _heard(effects, silent)
        apart = [(rows, _heard(edit.effects(), silent)) for edit, rows in rows_of.items()]
        every = [*shared, *(effect for _, effects in apart for effect in effects)]
        states = _states_hooks(every, apart, len(carried))
        hooks = [*_module_hooks(model, shared, apart, len(carried)), *states]
        logits = of_type(every, ChangeLogits)
        if logits:
            hook = LogitsHook(logits)
            hooks += [*hook.readers(), ("", hook)]
        prompts = [
            group[0].build([effect.content for effect in group])
            for group in families(shared, RewritePrompt)
        ]
        decides = bool(states or of_type(every, RouteRows))
        reads_prompts = bool(decides or logits)
        reads_rows = bool(apart or reads_prompts)
        acting = [effect for effect in every if not isinstance(effect, KeepMemory)]
        spares = all(isinstance(effect, RouteRows) and effect.spares_heads for effect in acting)
        return cls(hooks, prompts, reads_rows, reads_prompts, bool(states), decides, spares)
