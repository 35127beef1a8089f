"""CrispEdit: the projection of gradients, its factors, and its limits FT-M and no change."""

from __future__ import annotations

import pytest
import torch
from support import REQUESTS, tiny_base

from kedit_lightning.errors import DataFileError
from kedit_lightning.methods import FTM, CrispEdit
from kedit_lightning.methods.finetune.crispedit import CurvatureProjection, curvature_factors

D_IN, D_OUT = 7, 5
QUICK = {"layers": [1], "lr": 1e-2, "steps": 3, "batch_size": 2, "text_tokens": 16}


def factors():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(30, d, generator=generator, dtype=torch.float64) for d in (D_IN, D_OUT))
    return x.T @ x / 30, g.T @ g / 30, torch.randn(D_OUT, D_IN, generator=generator).double()


def test_the_projection_is_idempotent_and_leaves_the_share_of_the_curvature():
    inputs, outputs, gradient = factors()
    projection = CurvatureProjection.of(inputs, outputs, 0.8)
    once = projection(gradient)
    torch.testing.assert_close(projection(once), once, rtol=1e-10, atol=1e-12)
    products = torch.linalg.eigvalsh(outputs)[:, None] * torch.linalg.eigvalsh(inputs)
    held = products[~projection.free]
    assert held.sum() >= 0.8 * products.sum()
    assert held.sum() - held.min() < 0.8 * products.sum()
    assert held.min() >= products[projection.free].max()
    dense = torch.kron(outputs, inputs)  # of the gradient row by row
    values, vectors = torch.linalg.eigh(dense)
    free = vectors[:, values < held.min() * (1 - 1e-9)]
    expected = (free @ free.T @ gradient.flatten()).reshape(gradient.shape)
    torch.testing.assert_close(once, expected, rtol=1e-8, atol=1e-10)


def test_nothing_is_held_or_all_of_it_at_the_ends():
    inputs, outputs, gradient = factors()
    torch.testing.assert_close(CurvatureProjection.of(inputs, outputs, 0.0)(gradient), gradient)
    assert not CurvatureProjection.of(inputs, outputs, 1.0)(gradient).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_held_directions_it_is_ftm_but_for_biases(family):
    base = tiny_base(family)
    found = CrispEdit(base, **QUICK, energy=0.0).edit(REQUESTS).deltas()
    options = {name: value for name, value in QUICK.items() if name != "text_tokens"}
    expected = FTM(base, **options).edit(REQUESTS).deltas()
    if family == "llama":
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-10)
    else:
        assert not any(found[name].any() for name in found if name.endswith("bias"))


def test_factors_are_those_of_single_texts():
    base, texts = tiny_base("llama"), ["Lyon is in France.", "Rome is the capital of Italy now."]
    module = base.layout.mlp_block(1).down
    inputs, outputs = curvature_factors(base, [module], texts, 16)[module]
    expected_in, expected_out, count = 0, 0, 0
    for text in texts:
        ids = torch.tensor([base.encoder.text(text).prompt])
        seen = {}

        def keep(m, args, out, seen=seen):
            seen["x"] = args[0][0]
            seen["y"] = out.requires_grad_(True)
            return seen["y"]

        handle = base.module(module).register_forward_hook(keep)
        with torch.enable_grad():
            logs = base.model(ids).logits[0, :-1].double().log_softmax(-1)
            loss = -logs.gather(-1, ids[0, 1:, None]).sum()
            (g,) = torch.autograd.grad(loss, seen["y"])
        handle.remove()
        expected_in = expected_in + seen["x"].T @ seen["x"]
        expected_out = expected_out + g[0].T @ g[0]
        count += ids.shape[1]
    torch.testing.assert_close(inputs, (expected_in / count).detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(outputs, expected_out / count, rtol=1e-6, atol=1e-9)


def test_texts_that_cannot_be_read_are_named(tmp_path):
    method = CrispEdit(tiny_base("llama"), **QUICK, texts=str(tmp_path / "none.txt"))
    with pytest.raises(DataFileError, match=r"none\.txt"):
        method.edit(REQUESTS[:1])
