"""Reversible changes of a base model."""

from kedit_lightning.edits.edit import Edit, EditOrigin
from kedit_lightning.edits.kinds.codebook.codebook_edit import CodebookEdit, MemoryEdit
from kedit_lightning.edits.kinds.composite import CompositeEdit
from kedit_lightning.edits.kinds.decoding import DecodingEdit
from kedit_lightning.edits.kinds.prompt.prompt_edit import PromptEdit, PromptEntry
from kedit_lightning.edits.kinds.scope.scope_edit import ScopeEdit, ScopeEntry
from kedit_lightning.edits.kinds.weights import AdapterEdit, DenseEdit, LowRankEdit, memories
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.stack import EditStack

__all__ = [
    "AdapterEdit",
    "CodebookEdit",
    "CompositeEdit",
    "DecodingEdit",
    "DenseEdit",
    "Edit",
    "EditOrigin",
    "EditStack",
    "LowRankDelta",
    "LowRankEdit",
    "MemoryEdit",
    "PromptEdit",
    "PromptEntry",
    "ScopeEdit",
    "ScopeEntry",
    "memories",
]
