"""SimIE: turns low-rank edits of any method into the joint regression of a sequence of edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import LowRankDelta, LowRankEdit, memories
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.edits.stack_chain import stack_mark
from kedit_lightning.errors import EditOrderError, UnsupportedUseError
from kedit_lightning.methods.locate.shared import least_squares
from kedit_lightning.methods.locate.shared.subject_states import subject_states
from kedit_lightning.requests import EditRequest

_KEYS = ".keys"


def subject_keys(
    base: BaseModel, modules: Sequence[str], requests: Sequence[EditRequest]
) -> dict[str, Tensor]:
    """Keys of projections: their inputs at the last token of each request's subject.

    Args:
        base: The base model, as its stack stands.
        modules: Names, in the order they run.
        requests: The requests; each has a subject.

    Returns:
        Shape ``[d_in, n]`` by module.
    """
    inputs = subject_states(base, modules, requests).inputs
    return {name: inputs[name][:, 0].T for name in modules}


def simie(
    edit: LowRankEdit,
    keys: Mapping[str, Tensor],
    history: Mapping[str, Tensor] | None = None,
    lam: float = 1e4,
) -> LowRankEdit:
    """The step of an edit in the ridge regression of all edits of a sequence.

    ``W_t = W_{t-1} + (W_edit − W_{t-1}) K Kᵀ P_t⁻¹`` with ``P_t = P_{t-1} + K Kᵀ`` and
    ``P_0 = λI``: after any number of steps, ``W_t`` is closest to every ``W_edit`` on its own keys
    and to the unedited weight everywhere, weighed by ``λ``.  The keys are the result's memory, so
    that the next call finds them on the stack.

    Args:
        edit: A low-rank edit of any method, computed on the stack as it stands and not applied.
        keys: Keys of the facts that it writes, ``[d_in, n]`` by edited projection; see
            :func:`subject_keys`.
        history: The same of the edits before it, ``[d_in, m]`` by module; those that the edits on
            the stack remember if absent.
        lam: Weight of keeping the unedited weight.  It counts against the squared length of the
            keys, so that the usual 10000 stifles every edit of a small model (10 suits ``nano``).

    Returns:
        An edit of rank ``n``, by method ``SimIE``.

    Raises:
        UnsupportedUseError: Keys of an edited projection are missing, or the edit has a memory of
            its own, which edits after it would look for in vain.
        EditOrderError: The history is to be read from another stack than the edit was computed on.
    """
    missing = edit.factors.keys() - keys.keys()
    if missing:
        raise UnsupportedUseError(
            f"SimIE needs the keys of every edited projection, and those of "
            f"{', '.join(sorted(missing))} are missing; read them with subject_keys()"
        )
    if edit.memory:
        raise UnsupportedUseError(
            f"edit {edit.id} by {edit.origin.method or 'hand'} remembers facts for the edits after "
            "it already, so SimIE would do the same a second time; apply it as it is"
        )
    if history is None:
        if edit.origin.method and stack_mark(edit.origin.stack) != edit.base.edits.mark:
            raise EditOrderError(
                f"edit {edit.id} by {edit.origin.method} was computed on another stack than the "
                "one whose keys SimIE would read; compute it again, or give the history"
            )
        past = memories(edit.base, "SimIE")
        known = {n: [m[n + _KEYS] for m in past if n + _KEYS in m] for n in edit.factors}
        history = {name: torch.cat(parts, dim=1) for name, parts in known.items() if parts}
    deltas, memory = {}, {}
    for name, (a, b) in edit.factors.items():
        present = keys[name].detach().to(a.device)
        earlier = history.get(name, present[:, :0]).to(present)
        residuals = b.double() @ (a.double() @ present.double())
        prior = least_squares.with_history(least_squares.size_prior(lam), earlier.double())
        delta = least_squares.ridge_update(present, residuals, prior, eps=1.0)
        deltas[name] = LowRankDelta(delta.a.to(a), delta.b.to(b))
        memory[name + _KEYS] = present.contiguous()
    notes = {**edit.origin.notes, "host": edit.origin.method, "lam": lam}
    notes.pop(TARGET_PROBABILITIES, None)  # measured under the host's edit
    origin = replace(edit.origin, method="SimIE", notes=notes)
    return LowRankEdit(edit.base, deltas, origin, memory)
