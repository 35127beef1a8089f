"""Hidden states at subjects: what modules receive (keys) and return (values) there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow, TokenRows
from kedit_lightning.base_models.taps import Visit, add_at, capture, stop_after, visiting
from kedit_lightning.chat_turns import put_before
from kedit_lightning.edits import Edit
from kedit_lightning.edits.projections import compute_dtype
from kedit_lightning.image_reference import Image
from kedit_lightning.methods.shared.contexts import contexts_of
from kedit_lightning.requests import EditRequest

#: Rows of a forward pass; they are short, and nothing is kept but states at the subject.
ROWS_PER_PASS = 256
#: Subject tokens whose inputs are the key: the ``last``, the ``first``, or the mean over ``all``.
SubjectTokens: TypeAlias = Literal["last", "first", "all"]
#: An edit for each request that acts on its rows alone; ``None`` where all have the same.
Carried: TypeAlias = Sequence[Edit | None] | None


@dataclass(frozen=True)
class SubjectStates:
    """Inputs and outputs of modules at the subjects of requests.

    Args:
        inputs: Keys, ``[n, contexts, d_in]`` by module, the bare prompt first.
        outputs: Values at the subject's last token, ``[n, contexts, d_out]`` by module.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def part(self, requests: slice) -> SubjectStates:
        """The states of some requests."""
        return SubjectStates(
            {name: states[requests] for name, states in self.inputs.items()},
            {name: states[requests] for name, states in self.outputs.items()},
        )


@torch.no_grad()
def subject_states(
    base: BaseModel,
    modules: Sequence[str],
    requests: Sequence[EditRequest],
    contexts: Sequence[str] = (),
    carried: Carried = None,
    added: tuple[str, Tensor] | None = None,
    tokens: SubjectTokens = "last",
) -> SubjectStates:
    """States of modules for each request under each context, the bare prompt first.

    Rows end at the subject: later tokens change nothing there.

    Args:
        base: The base model, as its stack stands.
        modules: Names, in the order they run.
        requests: The requests; each has a subject.
        contexts: Texts put before each prompt, besides none.
        carried: An edit for each request.
        added: A module and vectors that are added to its output at the subject's last token of
            each request. Shape ``[n, d_out]``.
        tokens: Subject tokens whose inputs are read; a mean is at least float32.
    """
    count = 1 + len(contexts)
    asked = [
        (number, up_to_subject(base, put_before(context, r.prompt), r.subject, r.image))
        for number, r in enumerate(requests)
        for context in contexts_of(base, r, contexts)
    ]
    # A context that comes again is read once.
    places = {one: place for place, one in enumerate(dict.fromkeys(asked))}
    of_request, rows = zip(*places, strict=True)
    edits = None if carried is None else [carried[number] for number in of_request]
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    for start in range(0, len(rows), ROWS_PER_PASS):
        part = slice(start, start + ROWS_PER_PASS)
        in_force = nullcontext() if edits is None else base.edits.carried(edits[part])
        batch = base.pad(rows[part])
        visits: dict[str, Visit] = {}
        if added is not None:
            vectors = added[1][list(of_request[part])]
            visits[added[0]] = partial(_add, batch.subject_end, vectors)
        with (
            in_force,
            visiting(base.model, visits),
            capture(base.model, modules) as seen,
            stop_after(base.model, modules[-1]),
        ):
            base.forward(batch)
        for name in modules:
            inputs[name].append(_at_subject(seen.inputs[name], batch, tokens))
            outputs[name].append(_at_subject(seen.outputs[name], batch, "last"))
    shape, order = (len(requests), count, -1), [places[one] for one in asked]
    return SubjectStates(
        {name: torch.cat(parts)[order].reshape(shape) for name, parts in inputs.items()},
        {name: torch.cat(parts)[order].reshape(shape) for name, parts in outputs.items()},
    )


def up_to_subject(
    base: BaseModel, prompt: str, subject: str | None, image: Image | None = None
) -> EncodedRow:
    """A prompt that ends with its subject, or whole if edits look at the end of the prompt.

    It is whole with pictures too: there some models read the prompt in both directions.
    """
    row = base.encode(prompt, None, subject, image)
    if base.edits.reads_prompts or row.images:
        return row
    return replace(row, prompt=row.prompt[: row.subject_end + 1])


def _add(columns: Tensor, vectors: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return add_at(y, columns, vectors)


def _at_subject(states: Tensor, rows: TokenRows, tokens: SubjectTokens) -> Tensor:
    """States at subjects, ``[batch, width]`` from ``[batch, tokens, width]``."""
    if tokens == "all":
        mask = rows.subject_mask.to(states.device)[..., None]
        # Padding may hold anything.
        subject = torch.where(mask, states, 0).to(compute_dtype(states.dtype))
        return subject.sum(1) / mask.sum(1)
    column = rows.subject_end if tokens == "last" else rows.subject_start
    return states[torch.arange(len(rows), device=column.device), column]
