"""Sums over keys, from which a second moment and its error bar are computed.

All of them are additive over texts, so a pass can be stopped, resumed, and sharded over processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kedit_lightning.statistics.covariance import SecondMoment

#: Keys whose products are summed in the keys' own precision before they join the float64 sum; the
#: rounding of a float32 sum of this length is some 1e-7 of the result.
CHUNK = 4096
#: Largest number of column blocks of a matrix, none narrower than :data:`BLOCK`; only blocks on and
#: above the diagonal are computed, which halves the work.
BLOCKS = 16
BLOCK = 128
#: Number of random directions in which the error is measured.
PROBES = 8


def add_products(total: Tensor, keys: Tensor) -> None:
    """Add ``Σ k kᵀ`` to the blocks of a matrix on and above its diagonal, in place.

    ``total`` is ``[d_in, d_in]`` in float64, ``keys`` ``[n, d_in]`` in float32 or float64.
    """
    width = keys.shape[1]
    block = max(BLOCK, -(-width // BLOCKS))
    for chunk in keys.split(CHUNK):
        for start in range(0, width, block):
            columns = slice(start, start + block)
            products = chunk[:, columns].T @ chunk[:, start:]
            total[columns, start:] += products.to(total.device)


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix whose upper triangle is given. Shape ``[d, d]``."""
    return upper.triu() + upper.triu(1).T


class KeySums:
    """Sums over the keys of one layer.

    The error bar treats texts as independent draws: with ``Y_t = Ω Σ k kᵀ`` over the keys of text
    ``t`` and a fixed Gaussian ``Ω``, the residuals ``Y_t - n_t Ω C`` of a ratio estimate give the
    squared Frobenius error of ``C`` without a second matrix of its size.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        start = torch.Generator().manual_seed(0)
        drawn = torch.randn(PROBES, width, generator=start, dtype=torch.float64)
        self.probes = drawn.to(device)
        #: By name: ``products`` ``[d_in, d_in]`` (upper triangle), ``probed`` ``Σ Y_t`` and
        #: ``weighted`` ``Σ n_t Y_t`` ``[PROBES, d_in]``, ``squares`` ``Σ ‖Y_t‖²`` ``[]``.
        self.tensors = {
            "products": torch.zeros(width, width, dtype=torch.float64, device=device),
            "probed": torch.zeros_like(self.probes),
            "weighted": torch.zeros_like(self.probes),
            "squares": torch.zeros((), dtype=torch.float64, device=device),
        }
        #: Keys and their ``Ω Σ k kᵀ`` of a text whose end has yet to come.
        self._begun = 0, torch.zeros_like(self.probes)

    def add(self, keys: Tensor, lengths: Sequence[int], goes_on: bool = False) -> None:
        """Add keys ``[n, d_in]``, text after text; ``lengths`` are the tokens of each text.

        Where the last one ``goes_on``, the keys of the next call begin with more of it.
        """
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        sums = self.tensors
        with _full_precision():
            add_products(sums["products"], keys)
            along = keys @ self.probes.to(keys).T
            parts = zip(keys.split(lengths), along.split(lengths), strict=True)
            tokens, product = self._begun
            for left, (part, image) in zip(reversed(range(len(lengths))), parts, strict=True):
                tokens, product = tokens + len(part), product + (image.T @ part).to(self.probes)
                if left or not goes_on:  # the text ends here
                    sums["probed"] += product
                    sums["weighted"] += tokens * product
                    sums["squares"] += product.square().sum()
                    tokens, product = 0, torch.zeros_like(product)
            self._begun = tokens, product

    def moment(self, counts: Tensor) -> SecondMoment:
        """The second moment, with its error bar if there are two texts.

        Args:
            counts: Keys, sum of squared keys a text, and texts. Shape ``[3]``.
        """
        keys = int(counts[0])
        mean = mirrored(self.tensors["products"].cpu()) / max(1.0, float(keys))
        return SecondMoment(mean, keys, self.error(counts))

    def error(self, counts: Tensor) -> float | None:
        """The error bar alone; see :meth:`moment`."""
        keys, squared, texts = (float(value) for value in counts)
        if texts < 2:
            return None
        sums = self.tensors
        mean = sums["probed"] / keys
        size = mean.square().sum()
        if not float(size):  # no token has come to an expert
            return None
        residual = sums["squares"] - 2 * (sums["weighted"] * mean).sum() + squared * size
        variance = residual.clamp(min=0) * texts / (texts - 1) / keys**2
        return float((variance / size).sqrt())


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch TF32 off inside the block: its rounding would make moments indefinite."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


#: The hash of a corpus is the sum of the SHA-256 of its texts, in words of 32 bits: equal for any
#: order, batch size and number of processes, and additive like the moments.
_WORDS = 8


def no_texts() -> Tensor:
    """The hash of an empty corpus. Shape ``[8]``, int64."""
    return torch.zeros(_WORDS, dtype=torch.int64)


def hash_texts(texts: Sequence[str]) -> Tensor:
    """Sum of the hashes of texts. Shape ``[8]``, int64."""
    total = no_texts()
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        total += torch.tensor([int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)])
    return total


def hash_name(words: Tensor) -> str:
    """A sum of hashes, modulo 2²⁵⁶, as 64 hexadecimal digits."""
    number = 0
    for word in words.tolist():
        number = (number << 32) + word
    return f"{number % (1 << 256):064x}"
