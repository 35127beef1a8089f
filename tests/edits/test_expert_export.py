"""Changes of experts as adapters that plain peft reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mixtures import ROUTED, mixture, routed_layer, tiny_mixture, tiny_model
from support import REQUESTS
from torch import Tensor

from kedit_lightning import BaseModel
from kedit_lightning.edits import LowRankEdit, save_adapter
from kedit_lightning.errors import UnsupportedUseError

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
DAILY = ("mixtral", "gpt_oss", "jetmoe", "llama4_text")
MORE = [kind for kind in ROUTED if kind not in (*DAILY, "dbrx")]
KINDS = [*DAILY, *(pytest.param(kind, marks=pytest.mark.slow) for kind in MORE)]


def logits(base: BaseModel) -> Tensor:
    rows = base.rows([r.prompt for r in REQUESTS], [r.target_new for r in REQUESTS])
    with torch.no_grad():
        return base.answer_logits(rows)


def edit_of(base: BaseModel) -> LowRankEdit:
    """Changes of three experts, of three ranks."""
    projection = mixture(base, routed_layer(base))
    d_in, d_out = base.module(projection.name_of(0)).shape
    generator = torch.Generator().manual_seed(0)
    factors = {
        projection.name_of(expert): (
            torch.randn(rank, d_in, generator=generator, dtype=torch.float64),
            torch.randn(d_out, rank, generator=generator, dtype=torch.float64),
        )
        for expert, rank in ((0, 2), (1, 1), (3, 3))
    }
    return LowRankEdit(base, factors)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_answers_as_the_edit_does(kind: str, tmp_path: Path) -> None:
    import peft

    base = tiny_mixture(kind)
    edit, before = edit_of(base), logits(base)
    inputs = base.rows([REQUESTS[0].prompt], ["Rome"]).inputs
    with edit, torch.no_grad():
        wanted, whole = logits(base), base.model(**inputs).logits
    assert not torch.allclose(wanted, before, atol=1e-2)
    save_adapter(base, [edit], tmp_path)
    adapted = peft.PeftModel.from_pretrained(tiny_model(kind), str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, whole, atol=1e-4, rtol=1e-4)
    found = logits(BaseModel(adapted.merge_and_unload(), base.tokenizer, name="merged"))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_what_peft_would_leave_out_is_refused(tmp_path: Path) -> None:
    base = tiny_mixture("dbrx")
    with pytest.raises(UnsupportedUseError, match="would leave the change out; export the full"):
        save_adapter(base, [edit_of(base)], tmp_path)
