"""Key-value caches of the heads of rows; what several of them begin with is read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.prefill import prefilled
from kedit_lightning.base_models.rows import EncodedRow, pad_tails


def attends_to_all(base: BaseModel) -> bool:
    """Whether all blocks attend to all tokens: a window that slides counts padding too."""
    config = base.model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    kinds |= set(getattr(config, "attention_layers", None) or ()) - {"global"}  # GPT-Neo's names
    return kinds == {"full_attention"} and not getattr(config, "sliding_window", None)


def holds_keys(cache: Any) -> bool:
    """Whether all that a cache holds is keys and values of each token."""
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    other = [
        name
        for layer in cache.layers
        for name, value in vars(layer).items()
        if isinstance(value, Tensor) and value.dim() > 1 and name not in ("keys", "values")
    ]
    return not other and all(isinstance(part, Tensor) and part.dim() == 4 for part in held)


def common_beginnings(requests: Sequence[Sequence[EncodedRow]]) -> list[int]:
    """How many tokens before the last one of its subject each row shares with those in its place.

    Args:
        requests: The rows of each request, equally many.

    Returns:
        A number for each row, request after request.
    """
    shared = []
    for rows in zip(*requests, strict=True):
        most = max(0, min(row.subject_end for row in rows) - 1)
        columns = zip(*(row.prompt[:most] for row in rows), strict=True)
        shared.append(next((i for i, ids in enumerate(columns) if len(set(ids)) > 1), most))
    return shared * len(requests)


@torch.no_grad()
def head_cache(
    base: BaseModel,
    heads: Sequence[tuple[int, ...]],
    whole: Mapping[str, Tensor],
    shared: Sequence[int] | None = None,
) -> Any:
    """The cache of heads, padded on the left.

    Args:
        base: The base model, as its stack stands.
        heads: Tokens of each head.
        whole: The heads, padded.
        shared: Number of tokens that each head begins with and that others may begin with too.
    """
    stems = [head[:count] for head, count in zip(heads, shared or (), strict=False)]
    distinct = {stem: number for number, stem in enumerate(dict.fromkeys(stems))}
    saved = sum(map(len, stems)) - sum(map(len, distinct))
    if 4 * saved < sum(map(len, heads)) or not attends_to_all(base):
        return prefilled(base, whole)
    rows = [EncodedRow(head, ()) for head in heads]
    cuts = list(map(len, stems))
    first, rest = pad_tails(rows, cuts, base.pad_id, base.takes_positions, base.device)
    chosen = torch.tensor([stems.index(stem) for stem in distinct], device=base.device)
    begin = {name: values[chosen] for name, values in first.items()}
    begin["attention_mask"][:, -1] = 1  # an empty one is hidden below
    cache = prefilled(base, begin)
    if not holds_keys(cache):
        return prefilled(base, whole)
    numbers = torch.tensor([distinct[stem] for stem in stems], device=base.device)
    cache.batch_select_indices(numbers)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    cache = base.model(**rest.inputs, **options).past_key_values
    # Padding stands before and behind; all of it goes to the front, as in whole heads.
    mask, width = rest.attention_mask, whole["attention_mask"].shape[1]
    order = mask.argsort(dim=1, stable=True)[:, mask.shape[1] - width :]
    for layer in cache.layers:
        layer.keys, layer.values = (_taken(part, order) for part in (layer.keys, layer.values))
    return cache


def _taken(states: Tensor, order: Tensor) -> Tensor:
    """Columns ``[rows, width]`` of ``[rows, heads, tokens, d]``."""
    index = order.to(states.device)[:, None, :, None]
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
