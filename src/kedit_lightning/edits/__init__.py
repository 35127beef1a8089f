"""Reversible changes of a base model."""

from kedit_lightning.edits.base import Edit, EditOrigin
from kedit_lightning.edits.composite import CompositeEdit
from kedit_lightning.edits.decoding import DecodingEdit
from kedit_lightning.edits.memory import CodebookEdit, MemoryEdit
from kedit_lightning.edits.prompt import PromptEdit, PromptEntry
from kedit_lightning.edits.scope import ScopeEdit, ScopeEntry
from kedit_lightning.edits.stack import EditStack
from kedit_lightning.edits.weights import AdapterEdit, DenseEdit, LowRankEdit, memories

__all__ = [
    "AdapterEdit",
    "CodebookEdit",
    "CompositeEdit",
    "DecodingEdit",
    "DenseEdit",
    "Edit",
    "EditOrigin",
    "EditStack",
    "LowRankEdit",
    "MemoryEdit",
    "PromptEdit",
    "PromptEntry",
    "ScopeEdit",
    "ScopeEntry",
    "memories",
]
