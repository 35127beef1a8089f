"""Reversible changes of a base model."""

from typing import TYPE_CHECKING

from kedit_lightning.edits.compilation import plain_model
from kedit_lightning.edits.edit import LATE_KINDS, Edit, MemoryEdit
from kedit_lightning.edits.kinds.blocks.blocks_edit import BlocksEdit
from kedit_lightning.edits.kinds.codebook.codebook_edit import CodebookEdit
from kedit_lightning.edits.kinds.composite import CompositeEdit
from kedit_lightning.edits.kinds.decoding.decoding_edit import DecodingEdit
from kedit_lightning.edits.kinds.decoding.early_exit_edit import DeCoEdit, DoLaEdit
from kedit_lightning.edits.kinds.deferral.deferral_edit import Deferral, DeferralEdit
from kedit_lightning.edits.kinds.neurons.neurons_edit import NeuronsEdit
from kedit_lightning.edits.kinds.overlap.overlap_edit import OverlapEdit, OverlapPlan
from kedit_lightning.edits.kinds.prompt.prompt_edit import PromptEdit, PromptEntry
from kedit_lightning.edits.kinds.weights import AdapterEdit, DenseEdit, LowRankEdit, memories
from kedit_lightning.edits.low_rank import LowRankDelta
from kedit_lightning.edits.materialisation import materialise
from kedit_lightning.edits.origin import EditOrigin
from kedit_lightning.edits.rank_truncation import truncate
from kedit_lightning.edits.stack import EditStack
from kedit_lightning.registry import lazy_exports

if TYPE_CHECKING:
    from kedit_lightning.edits.export import load_adapter, save_adapter
    from kedit_lightning.edits.gguf_adapter import save_gguf_adapter
    from kedit_lightning.edits.kinds.scope.scope_edit import ScopeEdit, ScopeEntry
    from kedit_lightning.edits.kinds.side.side_edit import SideEdit, SidePlan

__all__ = [
    "AdapterEdit",
    "BlocksEdit",
    "CodebookEdit",
    "CompositeEdit",
    "DeCoEdit",
    "DecodingEdit",
    "Deferral",
    "DeferralEdit",
    "DenseEdit",
    "DoLaEdit",
    "Edit",
    "EditOrigin",
    "EditStack",
    "LowRankDelta",
    "LowRankEdit",
    "MemoryEdit",
    "NeuronsEdit",
    "OverlapEdit",
    "OverlapPlan",
    "PromptEdit",
    "PromptEntry",
    "ScopeEdit",
    "ScopeEntry",
    "SideEdit",
    "SidePlan",
    "load_adapter",
    "materialise",
    "memories",
    "plain_model",
    "save_adapter",
    "save_gguf_adapter",
    "truncate",
]

# These import transformers and peft, which take seconds.
_EXPORT = "kedit_lightning.edits.export"
_SCOPE = "kedit_lightning.edits.kinds.scope.scope_edit"
_SIDE = "kedit_lightning.edits.kinds.side.side_edit"
LATE_KINDS.update(scope=_SCOPE, side=_SIDE)
_LATE = {"load_adapter": _EXPORT, "save_adapter": _EXPORT}
_LATE["save_gguf_adapter"] = "kedit_lightning.edits.gguf_adapter"
_LATE |= {"ScopeEdit": _SCOPE, "ScopeEntry": _SCOPE, "SideEdit": _SIDE, "SidePlan": _SIDE}
__getattr__ = lazy_exports(None, _LATE)
