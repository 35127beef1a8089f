"""A decoding edit of your own: contrast the last block with one early block.

Run it with ``python examples/decoding_edit.py``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit_lightning import BaseModel
from kedit_lightning.edits import DecodingEdit, EditOrigin


class ContrastEdit(DecodingEdit):
    """Scores tokens by ``log p_final - log p_early`` among those that are plausible.

    Args:
        base: The base model.
        block: Block whose hidden states give the early distribution, through final norm and head.
        alpha: Tokens less likely than this share of the likeliest token are excluded.
    """

    kind: ClassVar[str] = "contrast"

    def __init__(
        self, base: Any, block: int, alpha: float = 0.1, origin: EditOrigin | None = None
    ) -> None:
        super().__init__(base, origin)
        self.block, self.alpha = block, alpha
        # Located now: the search runs the model, which calls an applied edit.
        self.unembedding = [n for n in (base.layout.final_norm, base.layout.head) if n]

    @property
    def reads(self) -> tuple[str, ...]:
        """The early block."""
        return (self.base.layout.block(self.block).name,)

    def adjust(self, logits: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        """Contrast logits ``[n, vocab]`` with those of the early states ``[n, hidden]``."""
        early, after = states[self.reads[0]], logits.log_softmax(-1)
        for name in self.unembedding:
            early = self.base.module(name)(early)
        plausible = after >= after.amax(-1, keepdim=True) + torch.tensor(self.alpha).log()
        return torch.where(plausible, after - early.log_softmax(-1), -1e4)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The settings; there are no tensors."""
        return {}, {"block": self.block, "alpha": self.alpha}

    @classmethod
    def from_state(cls, base: Any, origin: Any, tensors: Any, values: Any) -> "ContrastEdit":
        """Rebuild from the settings."""
        return cls(base, **values, origin=origin)


def main() -> None:
    """Answer prompts with the packaged model, without and with the edit."""
    base = BaseModel.load("nano")
    prompts = ["The capital of France is", "The Eiffel Tower is in the city of"]
    plain = base.generate(prompts, max_new_tokens=8)
    with ContrastEdit(base, block=0):
        contrasted = base.generate(prompts, max_new_tokens=8)
    for prompt, before, after in zip(prompts, plain, contrasted, strict=True):
        print(f"{prompt}\n  plain: {before}\n  contrast: {after}")


if __name__ == "__main__":
    main()
