"""Fine-tuning of single experts of a mixture."""

from __future__ import annotations

import pytest
import torch
from mixtures import FORMS, ROUTED, has_experts, mixture, routed_layer, tiny_mixture
from support import REQUESTS

from kedit_lightning.base_models.mixture import picking
from kedit_lightning.edits import DenseEdit
from kedit_lightning.methods import FTM
from kedit_lightning.methods.shared.gradient_factors import answer_loss

# tiny settings make some models of transformers complain
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = [*FORMS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ROUTED[len(FORMS) :])]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_trained_and_rolled_back(kind: str) -> None:
    base = tiny_mixture(kind)
    layer = routed_layer(base)
    ftm = FTM(base, layers=[layer], steps=8, lr=2e-2)
    rows = base.pad([base.encode(r.prompt, r.target_new) for r in REQUESTS[:2]])
    with torch.no_grad():
        before, loss = base.answer_logits(rows), float(answer_loss(base, rows).mean())
    edit = ftm.edit(REQUESTS[:2])
    assert isinstance(edit, DenseEdit)
    with edit, torch.no_grad():
        assert float(answer_loss(base, rows).mean()) < 0.9 * loss
    with torch.no_grad():
        assert torch.equal(base.answer_logits(rows), before)
    # Those, and only those, that the router picks where an answer is predicted.
    name, columns = mixture(base, layer).fused_name, rows.answer_columns
    with torch.no_grad(), picking(base.model, [name], columns) as picked:
        base.forward(rows)
    wanted = [n for n, weights in picked.items() if bool(weights[rows.answer_mask].any())]
    assert list(edit.changes) == sorted(wanted)
    has_bias = mixture(base, layer).experts.biases is not None
    assert all((bias is not None) == has_bias for _, bias in edit.changes.values())


def test_the_default_block_of_a_mixture_has_experts() -> None:
    base = tiny_mixture("mixtral")
    ftm = FTM(base)
    ftm.configure_model()
    assert ftm.modules_trained == ("model.layers.2.mlp.experts.down_proj",)
    assert has_experts(base, 2)
