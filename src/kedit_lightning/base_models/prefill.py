"""Prefill: the keys and values of tokens, and nothing that only their logits need."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.blocks import removing
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


def prefilled(
    base: BaseModel, inputs: Mapping[str, Tensor], outputs: BlockOutputs | None = None
) -> Any:
    """The cache of padded tokens, under the edits of now.

    Args:
        base: The base model, as its stack stands.
        inputs: The tokens. Shape ``[rows, tokens]`` each.
        outputs: Takes the outputs of all blocks but the last, if given.
    """
    names = [base.layout.block_name(index) for index in range(len(base.layout) - 1)]

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if outputs is not None:
            outputs[name] = output

    noted = names if outputs is not None else []
    with removing([base.module(n).register_forward_hook(partial(note, n)) for n in noted]):
        return _cache_of(base, inputs)


def _cache_of(base: BaseModel, inputs: Mapping[str, Tensor]) -> Any:
    options = {"use_cache": True, "logits_to_keep": 1}
    cache = empty_cache(base)
    if cache is not None:
        last = cache.layers[-1] = _LastLayer()  # type: ignore[no-untyped-call]
        with suppress(_Filled), uncompiled():
            base.model(**inputs, past_key_values=cache, **options)
        cache.layers[-1] = DynamicLayer()
        vars(cache.layers[-1]).update(vars(last))
        if last.is_initialized:
            return cache
    return base.model(**inputs, **options).past_key_values


def unchanged_blocks(base: BaseModel) -> int:
    """Number of the first blocks, in and below which the edits that act now change nothing."""
    modules = base.edits.modules if base.edits.active else ()
    return base.layout.first_block(modules) if modules else len(base.layout)
