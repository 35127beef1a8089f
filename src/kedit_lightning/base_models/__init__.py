"""Base models: loading, module location, rows of tokens, and taps on hidden states."""

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.blocks import Block
from kedit_lightning.base_models.layout import Layout
from kedit_lightning.base_models.rows import EncodedRow, PaddingSide, TokenRows
from kedit_lightning.base_models.spec import BaseModelSpec
from kedit_lightning.base_models.write_path import WritePath

__all__ = [
    "BaseModel",
    "BaseModelSpec",
    "Block",
    "EncodedRow",
    "Layout",
    "PaddingSide",
    "TokenRows",
    "WritePath",
]
