"""Rows of tokens: encoding, padding, positions."""

from kedit_lightning.base_models.rows.encoding import EncodedRow, RowEncoder, join_text
from kedit_lightning.base_models.rows.padding import (
    PaddingSide,
    TokenRows,
    pad_encoder_decoder_rows,
    pad_rows,
    pad_tails,
)
from kedit_lightning.base_models.rows.position import positions

__all__ = [
    "EncodedRow",
    "PaddingSide",
    "RowEncoder",
    "TokenRows",
    "join_text",
    "pad_encoder_decoder_rows",
    "pad_rows",
    "pad_tails",
    "positions",
]
