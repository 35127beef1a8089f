"""Collection of key covariances of many layers in one pass over text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel, Layout
from kedit_lightning.base_models.mixture import single_experts
from kedit_lightning.base_models.rows import EncodedRow, RowEncoder
from kedit_lightning.base_models.taps import Visit, stop_after, visiting
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.errors import ModuleNotLocatedError
from kedit_lightning.statistics.covariance import SecondMoment
from kedit_lightning.statistics.key_sums import KeySums, hash_name, hash_texts, no_texts

#: Tokens per dimension of the keys that are enough for a covariance: 2 are for GPT models, and 10
#: for all models tried in arXiv 2506.04226.
TOKENS_PER_DIMENSION = 10
Tokens: TypeAlias = tuple[int, ...]


class KeyCollector:
    """Accumulates second moments of the inputs of modules, over every token of texts.

    A text of more than ``max_tokens`` is read in several rows. A forward pass takes as many rows as
    there are texts in the batch. Edits of the base model are suspended. ``modules`` are names in
    the order in which they run; the key of an expert counts times its weight, and as 0 at tokens
    that go elsewhere.
    """

    def __init__(self, base: BaseModel, modules: Sequence[str], max_tokens: int = 512) -> None:
        self.base = base
        self.modules = tuple(modules)
        self.max_tokens = min(max_tokens, base.max_tokens)
        # Plain text goes into no chat template.
        self._encoder = RowEncoder(base.tokenizer)
        widths = {name: projection_shape(base.module(name))[0] for name in self.modules}
        device = _device_of_sums(base.device, list(widths.values()))
        self._sums = {name: KeySums(width, device) for name, width in widths.items()}
        #: Tokens, sum over texts of squared tokens, texts. Shape ``[3]``.
        self._counts = torch.zeros(3, dtype=torch.int64)
        self._hash = no_texts()

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> None:
        """Add the keys at every token of the texts; blank texts are skipped."""
        texts = [text for text in texts if text.strip()]
        if not texts:
            return
        prefix = self._encoder.prefix
        encoded = [self._encoder.text(text).prompt for text in texts]
        rows = [
            (number, row)
            for number, tokens in enumerate(encoded)
            for row in split_tokens(tokens, prefix, self.max_tokens)
        ]
        lengths = [0] * len(texts)
        for start in range(0, len(rows), len(texts)):
            part = rows[start : start + len(texts)]
            tokens_of = Counter[int]()
            for number, row in part:
                tokens_of[number] += len(row)
                lengths[number] += len(row)
            goes_on = [number for number, _ in rows[start + len(texts) :][:1]] == [part[-1][0]]
            self._pass([row for _, row in part], list(tokens_of.values()), goes_on)
        squares = sum(length**2 for length in lengths)
        self._counts += torch.tensor([sum(lengths), squares, len(lengths)])
        self._hash += hash_texts(texts)

    def _pass(self, rows: Sequence[Tokens], lengths: Sequence[int], goes_on: bool) -> None:
        """Add the keys of rows; see :meth:`KeySums.add`."""
        batch = self.base.pad([EncodedRow(row, ()) for row in rows])
        full = len({len(row) for row in rows}) == 1
        kept = None if full else batch.attention_mask.flatten().nonzero()[:, 0]

        def visit(name: str) -> Visit:
            def add(x: Tensor, y: Tensor) -> None:
                keys = x.flatten(0, 1)
                if kept is not None:
                    keys = keys[kept.to(keys.device)]
                self._sums[name].add(keys, lengths, goes_on)

            return add

        with (
            self.base.edits.suspended(),
            visiting(self.base.model, {name: visit(name) for name in self.modules}),
            stop_after(self.base.model, self.modules[-1]),
        ):
            self.base.forward(batch)

    # ---- results

    @property
    def tokens(self) -> int:
        """Tokens read so far."""
        return int(self._counts[0])

    @property
    def texts(self) -> int:
        """Texts read so far."""
        return int(self._counts[2])

    @property
    def corpus(self) -> str:
        """Hash of the texts read so far."""
        return hash_name(self._hash)

    @property
    def moments(self) -> dict[str, SecondMoment]:
        """The second moment of each module's keys."""
        return {name: sums.moment(self._counts) for name, sums in self._sums.items()}

    @property
    def error(self) -> float | None:
        """Largest relative standard error of a moment; ``None`` before there are two texts."""
        errors = [sums.error(self._counts) for sums in self._sums.values()]
        return max((error for error in errors if error is not None), default=None)

    def is_within(self, error: float, processes: int = 1) -> bool:
        """Whether every moment is precise enough, with at least 10 tokens per dimension.

        The relative standard error in the Frobenius norm says little about directions in which keys
        are small; the number of tokens covers those. Each of ``processes`` reads a share.
        """
        width = max(sums.probes.shape[1] for sums in self._sums.values())
        if self.tokens * processes < TOKENS_PER_DIMENSION * width:
            return False
        reached = self.error
        return reached is not None and reached <= error * processes**0.5

    # ---- state: sums, which are additive over passes

    def state(self) -> dict[str, Tensor]:
        """All sums by name, without copies."""
        named = {
            f"{kind}.{name}": tensor
            for name, sums in self._sums.items()
            for kind, tensor in sums.tensors.items()
        }
        return {"counts": self._counts, "hash": self._hash, **named}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from :meth:`state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Replace every sum by its ``total`` over processes, in the same order in all of them."""
        for tensor in self.state().values():
            tensor.copy_(total(tensor.clone()))


def keyed_projections(layout: Layout, routed: Collection[int]) -> list[str]:
    """Projections whose keys have statistics, in the order they run.

    They are the down projections of all dense MLPs, or what mixers write where blocks are that
    alone, and, of the blocks in ``routed`` without one,
    those of single experts: all experts of all blocks would be more than a model itself holds.
    """
    names: list[str] = []
    for index in range(len(layout)):
        with suppress(ModuleNotLocatedError):
            block = layout.mlp_block(index)
            if not block.is_routed:
                names.append(block.down)
            elif index in routed:
                names += single_experts(layout.model, block.down)
    return names


def split_tokens(tokens: Tokens, prefix: Tokens, length: int) -> list[Tokens]:
    """Split the tokens of a text into rows of about equal length; none is lost.

    Args:
        tokens: The text, with the tokens that begin a row.
        prefix: Those tokens, which every row then begins with; the text may lack them.
        length: Largest number of tokens of a row.
    """
    head = prefix if tokens[: len(prefix)] == prefix and len(prefix) < length else ()
    body = tokens[len(head) :]
    parts = max(1, -(-len(body) // (length - len(head))))
    size = max(1, -(-len(body) // parts))
    return [(*head, *body[i : i + size]) for i in range(0, len(body), size)] or [tokens]


def _device_of_sums(device: torch.device, widths: Sequence[int]) -> torch.device:
    """The model's CUDA device if it has room for the sums, else the host."""
    wanted = 2 * sum(8 * width**2 for width in widths)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > wanted:
        return device
    return torch.device("cpu")
