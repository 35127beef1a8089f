"""Pictures that a decoder reads by cross-attention, beside its tokens, as Mllama does.

Every row of a batch is given as many states of pictures.  A row without pictures has states of
zeros, from which attention without biases reads zeros.  Tokens before the first picture attend to
all states of their row, so pictures are repeated whole: the weights of the copies add up to those
of one, and the mask of later tokens shows the first copy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from kedit_lightning.base_models.rows import EncodedRow, TokenRows
from kedit_lightning.base_models.rows.padding import RowPictures


def picture_states(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder attends to in the pictures of a row, and which of their tiles hold them.

    Args:
        model: The part of the model that has vision tower and projector.
        inputs: Inputs of the pictures of one row, ``[1, images, ...]`` each.

    Returns:
        ``states`` ``[images, tokens, hidden]``, and ``tiles`` ``[images]``, their numbers.
    """
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    seen = model.vision_model(**{name: inputs[name] for name in names}).last_hidden_state
    states = model.multi_modal_projector(seen)
    return {
        "states": states.reshape(states.shape[1], -1, states.shape[-1]),
        "tiles": inputs["aspect_ratio_mask"][0].sum(-1),
    }


def attended_pictures(
    pictures: Sequence[RowPictures | None],
    encoded: Sequence[EncodedRow],
    rows: TokenRows,
    token: int,
    most: int,
) -> dict[str, Tensor]:
    """What a pass of rows is given of their pictures.

    Args:
        pictures: Those of each row, as :func:`picture_states` makes them.
        encoded: The rows.
        rows: The same rows, padded on either side.
        token: Id of the token that stands for a picture.
        most: Tiles that each picture has room for.

    Returns:
        ``cross_attention_states`` ``[batch, tokens of pictures, hidden]``, and
        ``cross_attention_mask`` ``[batch, tokens, images, tiles]``.
    """
    known = [one.kept["states"] for one in pictures if one is not None]
    count = lcm(*map(len, known))
    (tokens, hidden), mask = known[0].shape[1:], rows.attention_mask
    states = known[0].new_zeros(len(encoded), count, tokens, hidden)
    shown = torch.zeros((*mask.shape, count, most), dtype=torch.long)
    for i, (row, own) in enumerate(zip(encoded, pictures, strict=True)):
        if own is None:
            continue
        images = len(own.kept["states"])
        states[i] = own.kept["states"].repeat(count // images, 1, 1)
        ids = [*row.prompt, *row.answer]
        dense = convert_sparse_cross_attention_mask_to_dense(
            [get_cross_attention_token_mask(ids, token)],
            [own.kept["tiles"].tolist()],
            most,
            len(ids),
        )
        first = int(mask[i].argmax())
        shown[i, first : first + len(ids), :images] = torch.from_numpy(dense)[0]
    return {
        "cross_attention_states": states.flatten(1, 2),
        "cross_attention_mask": shown.to(mask.device),
    }
