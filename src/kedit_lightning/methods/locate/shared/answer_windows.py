"""Windows of long answers, and hidden states at the tokens before them (AnyEdit)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, EncodedRow
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.edits import Edit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.locate.shared.subject_states import Carried, SubjectStates
from kedit_lightning.requests import EditRequest

#: Rows of a forward pass; they are long, and inputs are kept at all of their tokens.
ROWS_PER_PASS = 16


@dataclass(frozen=True)
class AnswerWindows:
    """A prompt with its answer, cut into windows; each follows from the token before it.

    Args:
        request: The request.
        row: Its prompt and answer.
        size: Tokens of a window; the last may have fewer.
    """

    request: EditRequest
    row: EncodedRow
    size: int

    @classmethod
    def of(
        cls, base: BaseModel, request: EditRequest, size: int | None, ended: bool
    ) -> AnswerWindows:
        """The windows of a request; without a size the answer is one.

        Args:
            base: The base model.
            request: The request.
            size: Tokens of a window.
            ended: Whether the end-of-text token follows the answer and is part of its last window.

        Raises:
            UnsupportedUseError: It is to follow, and the tokenizer has none.
        """
        answer, eos = request.target_new, base.tokenizer.eos_token
        if ended and eos is None:
            raise UnsupportedUseError(
                f"eos_in_target needs an end-of-text token, and the tokenizer of '{base.name}' has "
                "none; set eos_in_target to false"
            )
        seen, ending = request.image, f"{answer}{eos}" if ended else answer
        row = base.encode(request.prompt, ending, image=seen)
        if ended and len(row.prompt) + len(row.answer) > base.max_tokens:
            row = base.encode(request.prompt, answer, image=seen)  # fits without its end alone
        return cls(request, row, size or len(row.answer))

    def __len__(self) -> int:
        return -(-len(self.row.answer) // self.size)

    def up_to(self, number: int) -> EncodedRow:
        """The row up to the end of a window."""
        return replace(self.row, answer=self.row.answer[: (number + 1) * self.size])

    @property
    def places(self) -> list[int]:
        """Index in the row of the token before each window."""
        return [len(self.row.prompt) - 1 + i * self.size for i in range(len(self))]


@dataclass(frozen=True)
class WindowStates(SubjectStates):
    """States at the tokens before windows, and keys of the other tokens of their rows.

    Args:
        inputs: Keys, ``[windows, 1, d_in]`` by module.
        outputs: Values, ``[windows, 1, d_out]`` by module.
        others: Keys of the tokens from the one before a window up to the next window's, without
            both; those of the prompt belong to the first.  ``[m, d_in]`` by module and window.
    """

    others: Mapping[str, Sequence[Tensor]]

    def part(self, requests: slice) -> WindowStates:
        """The states of some windows."""
        part = super().part(requests)
        others = {name: keys[requests] for name, keys in self.others.items()}
        return WindowStates(part.inputs, part.outputs, others)


@torch.no_grad()
def window_states(
    base: BaseModel,
    modules: Sequence[str],
    answers: Sequence[AnswerWindows],
    carried: Carried = None,
) -> WindowStates:
    """States of modules before each window of each answer, in order.

    Args:
        base: The base model, as its stack stands.
        modules: Names, in the order they run.
        answers: The answers, of which whole rows are read.
        carried: An edit for each answer.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    others: dict[str, list[Tensor]] = {name: [] for name in modules}
    for start in range(0, len(answers), ROWS_PER_PASS):
        part = slice(start, start + ROWS_PER_PASS)
        rows = base.pad([answer.row for answer in answers[part]], "right")
        edits: Sequence[Edit | None] = [None] * len(rows) if carried is None else carried[part]
        with (
            base.edits.carried(edits),
            capture(base.model, modules) as seen,
            stop_after(base.model, modules[-1]),
        ):
            base.forward(rows)
        for name in modules:
            for number, answer in enumerate(answers[part]):
                length = len(answer.row.prompt) + len(answer.row.answer)
                own, places = seen.inputs[name][number, :length], answer.places
                inputs[name].append(own[places])
                outputs[name].append(seen.outputs[name][number, places])
                others[name] += _between(own, places)
    return WindowStates(
        {name: torch.cat(parts)[:, None] for name, parts in inputs.items()},
        {name: torch.cat(parts)[:, None] for name, parts in outputs.items()},
        others,
    )


def _between(states: Tensor, places: Sequence[int]) -> list[Tensor]:
    """States ``[tokens, width]`` at the other tokens, shared out among the windows."""
    ends = [*places[1:], len(states)]
    between = [states[at + 1 : end].clone() for at, end in zip(places, ends, strict=True)]
    between[0] = torch.cat([states[: places[0]], between[0]])
    return between
