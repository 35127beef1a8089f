"""Rows of tokens: encoding, padding, positions."""

from kedit_lightning.base_models.rows.encoding import (
    EncodedRow,
    PaddingSide,
    RowEncoder,
    TokenRows,
    join_text,
    pad_encoder_decoder_rows,
    pad_rows,
    pad_tails,
    positions,
)

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
