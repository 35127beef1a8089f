"""Base models: loading, finding their parts, rows of tokens, and reading what flows through."""

from kedit_lightning.base_models.base_model import BaseModel
from kedit_lightning.base_models.layout import Block, Layout, WritePath
from kedit_lightning.base_models.rows import EncodedRow, PaddingSide, TokenRows
from kedit_lightning.base_models.spec import BaseModelSpec

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
