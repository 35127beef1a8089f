"""What modules see and return at the subject's last token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow, TokenRows
from kedit_lightning.base_models.taps import add_at, capture, change_output, stop_after
from kedit_lightning.edits import Edit
from kedit_lightning.requests import EditRequest

#: Rows of a forward pass; they are short, and nothing is kept but the subject's last token.
ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Reading:
    """Inputs and outputs of modules at the subject's last token.

    Args:
        inputs: Shape ``[n, contexts, d_in]`` by module, the bare prompt first.
        outputs: Shape ``[n, contexts, d_out]`` by module.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def part(self, requests: slice) -> Reading:
        """The reading of some requests."""
        return Reading(
            {name: values[requests] for name, values in self.inputs.items()},
            {name: values[requests] for name, values in self.outputs.items()},
        )


@torch.no_grad()
def read(
    base: BaseModel,
    modules: Sequence[str],
    requests: Sequence[EditRequest],
    contexts: Sequence[str] = (),
    carried: Sequence[Edit | None] | None = None,
    added: tuple[str, Tensor] | None = None,
) -> Reading:
    """Read modules for each request under each context, the bare prompt first.

    Rows end at the subject: what follows it changes nothing there.

    Args:
        base: The base model, as its stack stands.
        modules: Names, in the order they run.
        requests: The requests; each has a subject.
        contexts: Texts put before each prompt, besides none.
        carried: An edit for each request that acts on its rows alone.
        added: A module, and what is added to its output for each request. Shape ``[n, d_out]``.
    """
    prefixes = ("", *contexts)
    rows = [_encode(base, prefix, request) for request in requests for prefix in prefixes]
    edits = None if carried is None else [edit for edit in carried for _ in prefixes]
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        part = slice(start, start + ROWS_AT_A_TIME)
        acting = nullcontext() if edits is None else base.edits.carried(edits[part])
        batch = base.pad(rows[part])
        with acting, _adding(base, batch, added, part, len(prefixes)):
            for name, x, y in _read_rows(base, modules, batch):
                inputs[name].append(x)
                outputs[name].append(y)
    shape = (len(requests), len(prefixes), -1)
    return Reading(
        {name: torch.cat(found).reshape(shape) for name, found in inputs.items()},
        {name: torch.cat(found).reshape(shape) for name, found in outputs.items()},
    )


def _encode(base: BaseModel, prefix: str, request: EditRequest) -> EncodedRow:
    row = base.encode(prefix + request.prompt, None, request.subject)
    if base.edits.reads_rows:  # memory edits look at the end of the prompt
        return row
    return replace(row, prompt=row.prompt[: row.subject_end + 1])


@contextmanager
def _adding(
    base: BaseModel, rows: TokenRows, added: tuple[str, Tensor] | None, part: slice, contexts: int
) -> Iterator[None]:
    if added is None:
        yield
        return
    name, vectors = added
    own = vectors.repeat_interleave(contexts, dim=0)[part]
    with change_output(base.model, name, lambda y: add_at(y, rows.subject_end, own)):
        yield


def _read_rows(
    base: BaseModel, modules: Sequence[str], rows: TokenRows
) -> Iterator[tuple[str, Tensor, Tensor]]:
    with capture(base.model, modules) as seen, stop_after(base.model, modules[-1]):
        base.forward(rows)
    at = (torch.arange(len(rows), device=base.device), rows.subject_end)
    for name in modules:
        yield name, seen.inputs[name][at], seen.outputs[name][at]
