"""Where values are optimised: the modules to whose outputs a change is added."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.continuation import SAME, can_resume
from kedit_lightning.base_models.layout import Layout

#: Values are outputs of the block (MEMIT), of its MLP (ROME), or of its attention and MLP (PMET).
SiteOfValues: TypeAlias = Literal["block", "mlp", "attention and mlp"]


@dataclass(frozen=True)
class Site:
    """Where values are optimised.

    Args:
        modules: Modules to whose outputs a change is added at the subject's last token.
        block: Number of the block they belong to, or are.
        inside: Whether they are parts of the block, so that it must run for each pass.
        gain: Factor with which a change is added.
    """

    modules: tuple[str, ...]
    block: int
    inside: bool = True
    gain: float = 1.0

    @classmethod
    def of(cls, layout: Layout, layer: int, values: SiteOfValues) -> Site:
        """The site of a layer whose values are outputs of the block, or of parts of it."""
        block, index = layout.mlp_block(layer), layer % len(layout)
        if values == "attention and mlp":
            return cls((layout.attention(layer), block.writer), index)
        if values == "block" and layout.write_path(layer).is_linear:
            return cls((block.name,), index, inside=False)
        # A block that normalises the MLP's output does not pass on what is added to it.
        return cls((block.writer,), index)

    @property
    def resumes_at(self) -> int:
        """First block that runs in each pass."""
        return self.block if self.inside else self.block + 1

    def gain_of(self, layout: Layout, layer: int) -> float:
        """Factor with which the output of a layer's MLP reaches what values are."""
        return 1.0 if self.inside else layout.write_path(layer).gain

    def behind_block(self, base: BaseModel) -> Site:
        """Where a change has the same effect and passes start one block later, if there is a place.

        A block that adds its MLP's output to the residual stream passes a change of it on as it is,
        so the change may be added to the block's output and the block run once.  Edits on the stack
        may read what the MLP writes; under them a change stays where it is.
        """
        block = base.layout.mlp_block(self.block)
        if self.modules != (block.writer,) or base.edits.active or not can_resume(base):
            return self
        path = base.layout.write_path(self.block)
        if not (path.is_linear and path.nonlinearity < SAME[base.dtype.itemsize]):
            return self
        return Site((block.name,), self.block, inside=False, gain=path.exact_gain)
