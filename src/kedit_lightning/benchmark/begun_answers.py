"""Free answers of which passes along other tokens have shown the beginning."""

from __future__ import annotations

from collections.abc import Sequence

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.generation import sentence_ended, until_ended
from kedit_lightning.benchmark.protocol import Protocol
from kedit_lightning.decoding_settings import generation_config, in_force

#: Entries of a generation config that say which tokens there are, and choose none.
_IDS = {"bos_token_id", "eos_token_id", "decoder_start_token_id"}
#: Texts of ids that are remembered; a long stream asks for many more.
_TEXTS = 1 << 16


def is_plain(base: BaseModel, protocol: Protocol) -> bool:
    """Whether free answers are asked for, and each token of theirs is just the likeliest one."""
    config = generation_config(base.model)
    return protocol.generates and not in_force(config, protocol.generation).keys() - _IDS


class BegunAnswers:
    """When free answers end, and what they say: the first line or sentence.

    Args:
        base: The base model.
        protocol: How long answers may be.
    """

    def __init__(self, base: BaseModel, protocol: Protocol) -> None:
        self._base, self._longest = base, protocol.max_new_tokens
        last = generation_config(base.model).get("eos_token_id")
        self._last = {last} if isinstance(last, int) else set(last or ())
        #: Texts of ids; many answers are the same.
        self._texts: dict[tuple[int, ...], str] = {}

    def ended(self, prompt: int, ids: Sequence[int]) -> bool:
        """Whether an answer behind a prompt of so many tokens has come to an end."""
        room = max(1, min(self._longest, self._base.max_tokens - prompt))
        return len(ids) >= room or ids[-1] in self._last or sentence_ended(self._decoded(ids))

    def begun(self, prompt: int, fed: Sequence[int], predicted: Sequence[int]) -> list[int]:
        """The beginning of the answer that a pass along other tokens shows.

        Args:
            prompt: Number of tokens of the prompt.
            fed: The tokens that were fed.
            predicted: The likeliest token in place of each of them, and of the one behind.
        """
        ids: list[int] = []
        for token, other in zip(predicted, [*fed, None], strict=True):
            ids.append(token)
            if token != other or self.ended(prompt, ids):
                break
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """What an answer says."""
        return until_ended(list(ids), self._decoded)

    def _decoded(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        known = self._texts.get(key)
        if known is None:
            known = str(self._base.tokenizer.decode(list(ids), skip_special_tokens=True))
            if len(self._texts) >= _TEXTS:
                self._texts.clear()
            self._texts[key] = known
        return known
