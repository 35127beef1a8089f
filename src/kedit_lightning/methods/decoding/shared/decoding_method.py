"""What DoLa and DeCo share: earlier layers, and how their states become logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.blocks import text_config
from kedit_lightning.base_models.taps import Capture, capture
from kedit_lightning.contradictions import OnConflict, settle
from kedit_lightning.edits import Edit
from kedit_lightning.edits.kinds.decoding.early_exit_edit import EarlyExitEdit, EarlyExits
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.method import Capabilities, EditMethod
from kedit_lightning.requests import EditRequest

#: Relative difference below which logits count as the same: rounding in bfloat16 gives some 1e-2.
_SAME = 3e-2
_TEXT = "The water was black and still"


class DecodingMethod(EditMethod):
    """Changes how the next token is chosen, whatever is asked: it writes no facts.

    Its edit is the same for all requests, and needs none.
    """

    can: ClassVar[Capabilities] = Capabilities()
    writes_facts: ClassVar[bool] = False

    def edit(self, requests: Sequence[EditRequest] = (), on_conflict: OnConflict = "last") -> Edit:
        """The edit, which notes the probabilities of requests under it; none is missed.

        Args:
            requests: Facts that are asked about, if any.
            on_conflict: What is done where they contradict each other, as by other methods.
        """
        return self.noted_edit(settle(requests, on_conflict))

    @abstractmethod
    def compute_edit(self, requests: Sequence[EditRequest]) -> EarlyExitEdit:
        """The edit."""

    def exits(self, layers: Sequence[int], norm: bool) -> EarlyExits:
        """How hidden states behind some layers become logits.

        Args:
            layers: Numbers of layers: 0 is the embedding, and k the output of the k-th block.
            norm: Whether they go through the final norm first.

        Raises:
            UnsupportedUseError: The base model has no such layer, or no way from its hidden states
                to its logits is known.
        """
        base, count = self.base, len(self.base.layout)
        wrong = sorted({layer for layer in layers if not 0 <= layer < count})
        if wrong or not layers:
            raise UnsupportedUseError(
                f"{type(self).__name__} needs layers from 0 (the embedding) to {count - 1} of "
                f"'{base.name}', which has {count}; got {list(layers)} (--model.layers)"
            )
        unembedding = [name for name in (base.layout.final_norm, base.layout.head) if name]
        scale, soft_cap = logit_scaling(base, unembedding)
        modules = [base.layout.block_name(k - 1) if k else embedding_name(base) for k in layers]
        route = unembedding if norm else unembedding[-1:]
        return EarlyExits(tuple(modules), tuple(route), scale, soft_cap)


@torch.no_grad()
def _probed(base: BaseModel, names: Sequence[str]) -> tuple[Capture, Tensor]:
    """Inputs and outputs of modules on a short text, ``[1, tokens, width]``, and its logits."""
    ids = torch.tensor([base.encode(_TEXT).prompt], device=base.device)
    with base.edits.suspended(), capture(base.model, names) as seen:
        return seen, base.model(input_ids=ids, use_cache=False).logits


def logit_scaling(base: BaseModel, unembedding: Sequence[str]) -> tuple[float, float | None]:
    """What the model does to the output of its head: a factor, and a soft cap.

    Granite divides its logits and Gemma caps them; early logits must be on the same scale.

    Raises:
        UnsupportedUseError: It does something else.
    """
    head = unembedding[-1]
    seen, logits = _probed(base, [head])
    raw, logits = seen.outputs[head].double(), logits.double()
    cap = getattr(text_config(base.model), "final_logit_softcapping", None)
    if cap is not None and _near(cap * (raw / cap).tanh(), logits):
        return 1.0, float(cap)
    factor = float((raw * logits).sum() / raw.square().sum())
    if _near(factor * raw, logits):
        return (1.0 if abs(factor - 1) < _SAME else factor), None
    raise UnsupportedUseError(
        f"base model '{base.name}' changes the output of its head '{head}' in a way that is not "
        "known here, so logits of earlier layers would be on another scale; use a model whose "
        "logits are those of its head up to a factor or a soft cap"
    )


def embedding_name(base: BaseModel) -> str:
    """Name of the input embedding, whose output is what the first block reads.

    Raises:
        UnsupportedUseError: The first block reads something else, such as added positions.
    """
    embedding = base.model.get_input_embeddings()
    name = next(str(name) for name, module in base.model.named_modules() if module is embedding)
    block = base.layout.block_name(0)
    seen, _ = _probed(base, [name, block])
    given, read = seen.outputs[name].double(), seen.inputs[block].double()
    if given.shape != read.shape or not _near(read, given):
        raise UnsupportedUseError(
            f"the first block of '{base.name}' does not read what '{name}' gives, so layer 0 has "
            "no hidden state of its own here; leave 0 out of --model.layers"
        )
    return name


def _near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _SAME * wanted.norm())
