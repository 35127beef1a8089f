"""Codebooks of keys and values beside one layer (GRACE)."""

from kedit_lightning.edits.kinds.codebook.codebook import (
    Codebook,
    CodebookEntry,
    Replacement,
    build_codebook,
    replace_rows,
    write_entry,
)
from kedit_lightning.edits.kinds.codebook.codebook_edit import CodebookEdit, stacked_codebook

__all__ = [
    "Codebook",
    "CodebookEdit",
    "CodebookEntry",
    "Replacement",
    "build_codebook",
    "replace_rows",
    "stacked_codebook",
    "write_entry",
]
