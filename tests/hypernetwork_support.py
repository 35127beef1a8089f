"""What the tests of hypernetworks share: rows of requests, and gradients by plain autograd."""

from __future__ import annotations

import torch
from support import REQUESTS

from kedit_lightning.methods.shared.gradient_factors import answer_loss

#: Settings that make MEND quick.
SMALL = {"rank": 8, "lr": 1e-4, "edit_lr": 1e-3, "accumulate": 2}


def rows_of(base, requests=REQUESTS, side=None):
    prompts, targets = [r.prompt for r in requests], [r.target_new for r in requests]
    return base.rows(prompts, targets, padding_side=side)


def weight_gradients(base, rows, names):
    """Gradients ``[d_out, d_in]`` by autograd, with respect to the weights themselves."""
    weights = {name: base.module(name).weight for name in names}
    for weight in weights.values():
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(answer_loss(base, rows).sum(), list(weights.values()))
    for weight in weights.values():
        weight.requires_grad_(False)
    turn = type(base.module(names[0])).__name__ == "Conv1D"
    return {n: g.T if turn else g for n, g in zip(names, gradients, strict=True)}
