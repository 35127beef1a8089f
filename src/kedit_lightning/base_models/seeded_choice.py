"""Sampling that repeats: the draws of a row depend on its own tokens alone."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import LogitsProcessor


class SeededChoice(LogitsProcessor):
    """Draws the next token of each row from its ``k`` likeliest, and leaves no other choice.

    The draws start at the seed and the tokens of the row so far, without padding in front of it, so
    that neither other rows nor the batch size change them. A greedy ``generate`` then takes them.

    Args:
        pad_id: Id of padding.
        k: How many tokens are drawn from.
        seed: Start of the draws.
    """

    def __init__(self, pad_id: int, k: int = 5, seed: int = 0) -> None:
        self.pad_id, self.k, self.seed = pad_id, k, seed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores ``[batch, vocab]`` that are 0 at the token drawn and ``-inf`` elsewhere."""
        top = scores.topk(min(self.k, scores.shape[-1]), dim=-1)
        share = top.values.double().softmax(-1).cumsum(-1)  # [batch, k]
        drawn = torch.tensor([self._draw(row) for row in input_ids.tolist()], dtype=torch.float64)
        rank = (share < drawn.to(share.device)[:, None]).sum(-1, keepdim=True)
        rank = rank.clamp(max=share.shape[-1] - 1)  # a sum of shares may end just below 1
        chosen = top.indices.gather(-1, rank)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)

    def _draw(self, ids: list[int]) -> float:
        """A number in ``[0, 1)``."""
        start = next((at for at, id in enumerate(ids) if id != self.pad_id), len(ids))
        text = f"{self.seed}:{','.join(map(str, ids[start:]))}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
