"""What the tests of MALMEN and RLEdit share: dense references, and methods that saw data."""

from __future__ import annotations

import torch
from episode_support import EXAMPLES
from fit_support import fitted_by_ranks
from torch.func import functional_call

from kedit_lightning.methods import MALMEN, RLEdit
from kedit_lightning.methods.hypernetwork.shared.normal_equations import NormalEquations
from kedit_lightning.methods.hypernetwork.shared.parameter_shift import (
    capture_parts,
    training_shifts,
)
from kedit_lightning.methods.hypernetwork.shared.shift_gradient import shift_gradient
from kedit_lightning.methods.hypernetwork.shared.tensor_file import TensorFile

SMALL = {"rank": 8, "lr": 1e-4, "edit_lr": 1e-2, "n_edits": 2}
SMALL_RLEDIT = {"rank": 8, "lr": 1e-4, "edit_lr": 1e-2, "n_edits": 2, "trajectory": 2, "c_reg": 0.3}
FEW, MANY = 12, 60
WIDTHS = (32, 16)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(count, w, generator=generator).double() for w in WIDTHS)


def solved(keys, values, strength, parts=1, metric=None):
    with TensorFile() as file:
        equations = NormalEquations(*WIDTHS, file)
        for own in zip(keys.tensor_split(parts), values.tensor_split(parts), strict=True):
            equations.add(*own)
        return equations.solve(torch.as_tensor(strength, dtype=torch.float64), metric)


def dense(keys, values, strength, metric=None):
    metric = torch.eye(keys.shape[1]).double() if metric is None else metric
    return torch.linalg.solve(keys.T @ keys + strength * metric, keys.T @ values)


#: By what the size of a shift is: its metric.
METRICS = {"norm": None, "keys": torch.cov(rows(200)[0].T) + torch.diag(torch.arange(1.0, 33.0))}


def malmen(base, **settings):
    """An untrained MALMEN, built."""
    method = MALMEN(base, **{"checkpoint": "none", **SMALL, **settings})
    method.configure_model()
    return method


def write(method, examples):
    """The factors and the shifts of a training step."""
    return training_shifts(method.base, method.network, examples, method.settings.at_once)


def cost(method, parts, shifts, groups, c_reg=0.0):
    """The gradient of a training step with given shifts."""
    settings = method.settings
    weights = settings.c_edit, settings.c_loc, c_reg
    return shift_gradient(
        method.base, method.network, parts, shifts, groups, weights, settings.at_once
    )


def stirred(base, **settings):
    """A MALMEN whose networks have seen data and are no longer the identity."""
    return stir(MALMEN(base, **{"checkpoint": "none", **SMALL, **settings}))


def stir(method):
    """Show a method data, and move its networks away from the identity."""
    method.configure_model()
    write(method, method.draw_episodes(EXAMPLES, 1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.network.networks.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.01 * noise)
    return method


def stirred_rledit(base, kind=RLEdit, **settings):
    """A method whose networks have seen data and are no longer the identity."""
    own = (
        SMALL_RLEDIT if kind is RLEdit else {k: SMALL_RLEDIT[k] for k in ("rank", "lr", "edit_lr")}
    )
    return stir(kind(base, **{"checkpoint": "none", "blocks": 2, **own, **settings}))


def end_to_end(method, examples, c_loc=1.0, c_reg=0.0):
    """Loss of a step and its gradient, by autograd through dense solves and dense weights."""
    base, network = method.base, method.network
    requests = [request for example in examples for request in example.requests]
    parts = list(capture_parts(base, network, requests, 2))
    weights, size = {}, 0.0
    for name in network.plan.modules:
        keys = torch.cat([part[name].inputs for part in parts])
        gradients = torch.cat([part[name].gradients for part in parts])
        values = network.values(name, keys, gradients)
        shift = dense(keys, values, network.ridge(name), network.metric(name))
        weight = base.module(name).weight
        turned = type(base.module(name)).__name__ == "Conv1D"
        weights[f"{name}.weight"] = weight + (shift if turned else shift.T)
        size = size + shift.square().sum()

    def log_probs(probe, edited):
        rows = base.rows([probe.prompt], [probe.answers[0] if probe.answers else None])
        logits = functional_call(base.model, weights if edited else {}, (), rows.inputs).logits
        return logits.log_softmax(-1)[0, rows.answer_columns[0]], rows.answer_ids[0]

    losses = []
    for example in examples:
        nlls, kls = [], []
        for probe in example.asked:
            after, ids = log_probs(probe, edited=True)
            nlls.append(-after.gather(-1, ids[:, None])[:, 0])
        for probe in example.kept:
            after, before = (log_probs(probe, edited)[0] for edited in (True, False))
            kls.append((before.exp() * (before - after)).sum(-1))
        losses.append(torch.cat(nlls).mean() + c_loc * torch.cat(kls).mean())
    loss = torch.stack(losses).mean() + c_reg * size
    return loss, torch.autograd.grad(loss, list(network.parameters()))


def check_ranks(tmp_path, name, settings):
    one, first, second = fitted_by_ranks(tmp_path, name, settings, repeat=2)
    assert first["network.updates"] == 4
    for key, tensor in one.items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], tensor, rtol=1e-8, atol=1e-11), key
