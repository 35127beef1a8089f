"""Free generations of probes, under the edits that their rows carry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.prefix_states import PrefixStates
from kedit_lightning.base_models.seeded_choice import SeededChoice
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.data.dataloader import chunks
from kedit_lightning.edits import Edit
from kedit_lightning.requests import Probe

#: The edit that a row carries on top of the stack, or none.
Carried: TypeAlias = Edit | None

#: A free answer to a question about a passage may be this much longer than the passage.
_PASSAGE_ROOM = 1.5


def carrying(base: BaseModel, edits: Sequence[Carried]) -> AbstractContextManager[None]:
    """Inside, each row of a pass carries its edit."""
    return base.edits.carried(edits) if any(edits) else nullcontext()


class FreeTexts:
    """Free generations of a base model as it stands.

    Args:
        base: The base model.
        protocol: How long they may be, and how many are made together.
        prefixes: What prompts begin with under in-context edits.
    """

    def __init__(self, base: BaseModel, protocol: Protocol, prefixes: PrefixStates) -> None:
        self.base, self.protocol, self.prefixes = base, protocol, prefixes

    def sentences(self, asked: Iterable[tuple[Carried, Probe]]) -> dict[tuple[Carried, str], str]:
        """Generations up to the end of their first sentence, by edit and prompt."""
        if not self.protocol.generates:
            return {}
        prompts = [(edit, probe.prompt) for edit, probe in asked]
        return self._continued(prompts, self.protocol.max_new_tokens, stop=True)

    def passages(self, asked: Iterable[tuple[Carried, Probe]]) -> dict[tuple[Carried, Probe], str]:
        """Generations with room for the longest answer, and half as much again."""
        by_room: dict[int, list[tuple[Carried, Probe]]] = {}
        for one in asked:
            probe = one[1]
            if self.protocol.generates:
                rows = [self.base.encode(probe.prompt, answer) for answer in probe.answers]
                longest = max((len(row.answer) for row in rows), default=0)
                room = max(self.protocol.max_new_tokens, int(longest * _PASSAGE_ROOM))
                # By its own prompt, so that no longer one beside it takes of its room.
                left = self.base.max_tokens - self.base.encoder.count_prompt(probe.prompt)
                by_room.setdefault(max(1, min(-(-room // 32) * 32, left)), []).append(one)
        found: dict[tuple[Carried, Probe], str] = {}
        for room, some in by_room.items():
            texts = self._continued(
                [(edit, probe.prompt) for edit, probe in some], room, stop=False
            )
            found |= {(edit, probe): texts[edit, probe.prompt] for edit, probe in some}
        return found

    def samples(self, asked: Iterable[tuple[Carried, Probe]]) -> dict[tuple[Carried, Probe], str]:
        """Continuations with seeded draws, none unless the protocol asks for them."""
        if not (self.protocol.generates and self.protocol.sample_tokens):
            return {}
        kept = list(asked)
        prompts = [(edit, probe.prompt) for edit, probe in kept]
        # Rows are read whole: a gap of padding inside one would change its draws.
        options = {"logits_processor": [SeededChoice(self.base.pad_id)], "prefix_states": None}
        texts = self._continued(prompts, self.protocol.sample_tokens, stop=False, **options)
        return {(edit, probe): texts[edit, probe.prompt] for edit, probe in kept}

    def _continued(
        self, asked: Sequence[tuple[Carried, str]], length: int, stop: bool, **options: Any
    ) -> dict[tuple[Carried, str], str]:
        """Continuations of prompts under the edits that their rows carry, greedy if not sampled.

        Args:
            asked: Edits and prompts.
            length: Longest continuation, in tokens.
            stop: End at the first sentence.
            **options: Passed to :meth:`BaseModel.generate`.
        """
        unique = sorted(
            dict.fromkeys(asked),
            key=lambda key: (self.base.encoder.count_prompt(key[1]), key[1]),
        )
        size = self.protocol.score_batch_size
        texts: dict[tuple[Carried, str], str] = {}
        for batch in chunks(unique, size):
            prompts = [prompt for _, prompt in batch]
            with carrying(self.base, [edit for edit, _ in batch]):
                answers = self.base.generate(
                    prompts,
                    length,
                    size,
                    stop_at_sentence=stop,
                    generation=self.protocol.generation,
                    **{"prefix_states": self.prefixes, **options},
                )
            texts |= zip(batch, answers, strict=True)
        return texts
