"""Which free generations probes ask for, under the edits that their rows carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.seeded_choice import SeededChoice
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import Edit
from kedit_lightning.image_reference import Image, references
from kedit_lightning.requests import Probe

#: The edit that a row carries on top of the stack, or none.
Carried: TypeAlias = Edit | None
#: A probe that is asked under an edit.
Asked: TypeAlias = tuple[Carried, Probe]

#: An edit, the prompt that is asked under it, and the picture it is about.
Question: TypeAlias = tuple[Carried, str, Image | None]

#: A free answer to a question about a passage may be this much longer than the passage.
_PASSAGE_ROOM = 1.5


def carrying(base: BaseModel, edits: Sequence[Carried]) -> AbstractContextManager[None]:
    """Inside, each row of a pass carries its edit."""
    return base.edits.carried(edits) if any(edits) else nullcontext()


def question_of(asked: Asked) -> Question:
    """The edit, the prompt and the picture of a probe."""
    edit, probe = asked
    return edit, probe.prompt, probe.image


def by_length(base: BaseModel, questions: Iterable[Question]) -> list[Question]:
    """Questions sorted by length."""

    def order(one: Question) -> tuple[int, str]:
        return base.encoder.count_prompt(one[1], references(one[2])), one[1]

    return sorted(questions, key=order)


class Wanted(NamedTuple):
    """Free generations that are made alike.

    Args:
        asked: Probes, and the edits that their rows carry.
        options: Arguments of :meth:`BaseModel.generate`.
    """

    asked: Sequence[Asked]
    options: Mapping[str, Any]

    def batches(self, base: BaseModel, size: int) -> Iterator[Sequence[Question]]:
        """Edits and questions, each once, sorted by length and cut into batches."""
        yield from chunks(by_length(base, dict.fromkeys(map(question_of, self.asked))), size)


class FreeTexts:
    """Free generations that a protocol asks for.

    Args:
        base: The base model.
        protocol: How long they may be, and how many are made together.
        prefixes: What prompts begin with under in-context edits.
    """

    def __init__(self, base: BaseModel, protocol: Protocol, prefixes: PrefixStates) -> None:
        self.base, self.protocol, self.prefixes = base, protocol, prefixes

    def sentences(self, asked: Iterable[Asked]) -> Iterator[Wanted]:
        """Generations up to the end of their first sentence."""
        if self.protocol.generates:
            spoken = [one for one in asked if one[1].task is None or one[1].task.is_spoken]
            yield self._wanted(spoken, self.protocol.max_new_tokens, stop_at_sentence=True)

    def passages(self, asked: Iterable[Asked]) -> Iterator[Wanted]:
        """Generations with room for the longest answer, and half as much again."""
        by_room: dict[int, list[Asked]] = {}
        for one in asked if self.protocol.generates else ():
            probe = one[1]
            rows = [self.base.encode(probe.prompt, a, image=probe.image) for a in probe.answers]
            longest = max((len(row.answer) for row in rows), default=0)
            room = max(self.protocol.max_new_tokens, int(longest * _PASSAGE_ROOM))
            # By its own prompt, so that no longer one beside it takes of its room.
            seen = references(probe.image)
            left = self.base.max_tokens - self.base.encoder.count_prompt(probe.prompt, seen)
            by_room.setdefault(max(1, min(-(-room // 32) * 32, left)), []).append(one)
        for room, some in by_room.items():
            yield self._wanted(some, room)

    def samples(self, asked: Iterable[Asked]) -> Iterator[Wanted]:
        """Continuations with seeded draws, none unless the protocol asks for them."""
        if self.protocol.generates and self.protocol.sample_tokens:
            # Rows are read whole: a gap of padding inside one would change its draws.
            options = {"logits_processor": [SeededChoice(self.base.pad_id)], "prefix_states": None}
            yield self._wanted(list(asked), self.protocol.sample_tokens, **options)

    def _wanted(self, asked: Sequence[Asked], length: int, **options: Any) -> Wanted:
        """Greedy continuations of at most so many tokens, with other options than the usual."""
        usual: dict[str, Any] = {
            "max_new_tokens": length,
            "batch_size": self.protocol.score_batch_size,
            "generation": self.protocol.generation,
            "prefix_states": self.prefixes,
        }
        return Wanted(asked, {**usual, **options})
