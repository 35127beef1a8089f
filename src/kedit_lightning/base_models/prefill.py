"""Prefill: the keys and values of tokens, and nothing that only their logits need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.taps import noting_calls
from kedit_lightning.edits.compilation import uncompiled

#: Outputs of blocks in a pass, by the name of the block.
BlockOutputs = dict[str, Any]


class _Filled(Exception):  # noqa: N818 - no error: it ends a forward pass early
    """Raised once the last layer of a cache is filled."""


class _LastLayer(DynamicLayer):
    """The layer of the last block: once it has keys and values, only logits are left to compute."""

    def update(self, *args: Any, **kwargs: Any) -> Any:
        super().update(*args, **kwargs)
        raise _Filled


def empty_cache(base: BaseModel) -> DynamicCache | None:
    """A cache with a layer of keys and values for each block; ``None`` where there is another."""
    cache = DynamicCache(config=base.model.config)
    plain = all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if plain and len(cache.layers) == len(base.layout) else None


class Prefill:
    """A pass that fills a cache; the call of the model is the caller's.

    Args:
        base: The base model, as its stack stands.
    """

    def __init__(self, base: BaseModel) -> None:
        #: Options of the model's call.
        self.options: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        #: What that call has given, if it came to its end.
        self.output: Any = None
        self._filled: Any = empty_cache(base)
        if self._filled is not None:
            self._filled.layers[-1] = _LastLayer()  # type: ignore[no-untyped-call]
            self.options["past_key_values"] = self._filled

    @property
    def cache(self) -> Any:
        """What was filled."""
        cache = self._filled if self.output is None else self.output.past_key_values
        last = cache.layers[-1]
        if isinstance(last, _LastLayer):  # from here on it is like the others
            cache.layers[-1] = DynamicLayer()
            vars(cache.layers[-1]).update(vars(last))
        return cache


@contextmanager
def prefilling(base: BaseModel, outputs: BlockOutputs | None = None) -> Iterator[Prefill]:
    """Inside, the model is called with the options of a prefill, under the edits of now.

    Args:
        base: The base model, as its stack stands.
        outputs: Takes the outputs of all blocks but the last, if given.
    """
    noted = range(len(base.layout) - 1) if outputs is not None else ()
    names, prefill = [base.layout.block_name(index) for index in noted], Prefill(base)
    # A compiled model cannot be left in the middle.
    whole = uncompiled() if "past_key_values" in prefill.options else nullcontext()
    with noting_calls(base.model, names) as calls, suppress(_Filled), whole:
        yield prefill
    if outputs is not None:
        outputs |= {name: calls[name][0].output for name in names}


def prefilled(base: BaseModel, inputs: Mapping[str, Tensor]) -> Any:
    """The cache of padded tokens, under the edits of now. Shape of inputs: ``[rows, tokens]``."""
    with prefilling(base) as prefill:
        prefill.output = base.model(**inputs, **prefill.options)
    return prefill.cache


def unchanged_blocks(base: BaseModel) -> int:
    """Number of the first blocks, in and below which the edits that act now change nothing."""
    modules = base.edits.modules if base.edits.active else ()
    return base.layout.first_block(modules) if modules else len(base.layout)
