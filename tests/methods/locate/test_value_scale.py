"""Settings of closed-form methods for models in no table of published settings."""

from __future__ import annotations

import pytest
import torch
from support import tiny_base, tiny_model, tiny_tokenizer

from kedit_lightning import BaseModel
from kedit_lightning.methods import EMMET, MEMIT, PMET, ROME, AlphaEdit
from kedit_lightning.methods.locate.shared.closed_form_settings import (
    STEPS,
    TEXT_SHARE,
    layers_beside_attention,
    one_layer,
    several_layers,
)
from kedit_lightning.methods.locate.shared.least_squares import (
    covariance_prior,
    relative_weight,
    ridge_update,
    size_prior,
    weighted_prior,
)
from kedit_lightning.methods.locate.shared.value_scale import NORMALISED, hidden_ratio
from kedit_lightning.methods.locate.shared.value_site import Site
from kedit_lightning.requests import EditRequest

FACT = EditRequest("The capital of France is", "Lyon", subject="France")


def test_a_lone_key_is_moved_by_the_same_share_whatever_the_scale():
    torch.manual_seed(0)
    texts = torch.randn(7, 40, dtype=torch.float64)
    key, residual = torch.randn(7, 1, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    for scale, weight in ((1.0, 1.0), (1e-3, 15_000.0), (100.0, 1e-4)):
        covariance = scale**2 * texts @ texts.T / 40
        prior = covariance_prior(torch.linalg.cholesky(covariance), weight)
        weighted = weighted_prior(prior, relative_weight(prior, key, 0.25))
        a, b = ridge_update(key, residual, weighted, eps=1.0)
        torch.testing.assert_close(b @ a @ key, residual / 1.25)


def test_a_relative_weight_takes_the_mean_over_keys():
    keys = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    # mean(1, 9) = 5, of which a tenth is the weight
    assert relative_weight(size_prior(), keys, 0.1) == pytest.approx(0.5)


def test_the_weight_that_was_used_is_noted_and_gives_the_same_edit_again():
    base = tiny_base("llama", num_hidden_layers=4)
    options = {"steps": 3, "contexts": 1, "statistics": "identity"}
    several = MEMIT(base, layers=[1, 2], **options)
    groups = [[FACT], [EditRequest("Tarn is in", "Rome", subject="Tarn")]]
    ours, theirs = (edit.origin.notes["preserve"] for edit in several.edit_each(groups))
    assert len(ours) == len(theirs) == 2  # layers
    assert ours != theirs
    found = MEMIT(base, layers=[1], **options).edit([FACT])
    (weight,) = found.origin.notes["preserve"]
    given = MEMIT(base, layers=[1], preserve=weight, **options).edit([FACT])
    assert "preserve" not in given.origin.notes
    for name, (a, b) in found.factors.items():
        other_a, other_b = given.factors[name]
        torch.testing.assert_close(b @ a, other_b @ other_a, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("depth", "several", "beside_attention"),
    [(1, (0,), (0,)), (5, (0,), (0, 1)), (8, (0, 1), (0, 1, 2)), (11, (0, 1), (0, 1, 2))],
)
def test_shallow_models_are_edited_in_their_first_blocks(depth, several, beside_attention):
    base = tiny_base("gpt2", n_layer=depth)
    assert one_layer(base) == (0,)
    assert several_layers(base) == several
    assert layers_beside_attention(base) == beside_attention


def test_deep_models_are_edited_where_published_layers_lie():
    base = tiny_base("gpt2", n_layer=12)
    assert one_layer(base) == (4,)
    assert several_layers(base) == layers_beside_attention(base) == (3, 4)


def test_the_ratio_is_that_of_the_norms_of_block_and_part():
    base, model = tiny_base("llama"), tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    small = BaseModel(model, tiny_tokenizer(True), name="llama")
    part, tiny_part = (hidden_ratio(b, Site.of(b.layout, 1, "mlp")) for b in (base, small))
    # The block's output hardly moves, and its part is a thousandth.
    assert 0 < part < tiny_part / 100
    assert hidden_ratio(base, Site.of(base.layout, 1, "block")) == 1.0


def test_what_a_block_normalises_has_a_bound_of_its_own():
    base = tiny_base("olmo2")
    assert hidden_ratio(base, Site.of(base.layout, 1, "mlp")) == NORMALISED


@pytest.mark.parametrize("method", [ROME, MEMIT, PMET, EMMET, AlphaEdit])
def test_a_model_in_no_table_gets_them(method):
    built = method(tiny_base("gpt2"))
    built.configure_model()
    assert built.settings.steps == STEPS
    assert built.settings.preserve is None
    ratio = hidden_ratio(built.base, built.site(built.layers[-1]))
    assert built.settings.clamp == ratio
    chosen = method(tiny_base("gpt2"), clamp=0.5, steps=3, preserve=7.0)
    chosen.configure_model()
    assert (chosen.settings.clamp, chosen.settings.steps) == (0.5, 3)
    assert chosen.settings.preserve == 7.0


def test_a_fact_reaches_nearly_its_whole_value():
    base = tiny_base("gpt2")
    memit = MEMIT(base, layers=[0], contexts=0, steps=4, statistics="identity")
    memit.configure_model()
    values = memit.layer_values([FACT])
    wanted = values.residuals(0)
    with memit.edit([FACT]):
        left = values.residuals(0)
    torch.testing.assert_close(left, wanted * TEXT_SHARE / (1 + TEXT_SHARE), rtol=1e-3, atol=1e-4)
