"""Rows of tokens: encoding, padding, positions and pictures."""

from kedit_lightning.base_models.rows.encoding import EncodedRow, RowEncoder, join_text
from kedit_lightning.base_models.rows.image import ImageEncoder
from kedit_lightning.base_models.rows.padding import (
    PaddingSide,
    TokenRows,
    answering,
    pad_encoder_decoder_rows,
    pad_heads,
    pad_rows,
    pad_tails,
    put_behind,
    without_last,
)
from kedit_lightning.base_models.rows.position import positions

__all__ = [
    "EncodedRow",
    "ImageEncoder",
    "PaddingSide",
    "RowEncoder",
    "TokenRows",
    "answering",
    "join_text",
    "pad_encoder_decoder_rows",
    "pad_heads",
    "pad_rows",
    "pad_tails",
    "positions",
    "put_behind",
    "without_last",
]
