"""An edit of a sequence without one below it: another solve of the same keys and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kedit_lightning.methods.locate.shared.equations import Equation
from kedit_lightning.methods.locate.shared.least_squares import (
    covariance_prior,
    ridge_update,
    with_history,
)

D_IN, D_OUT, COUNT = 9, 7, 6


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


class Stream:
    """Keys, keys of present outputs, and wanted outputs of a few edits, and a covariance."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight, root = random(D_OUT, D_IN), random(D_IN, D_IN)
        self.covariance = root @ root.T + torch.eye(D_IN)
        self.keys = [random(1 + i % 3, D_IN) for i in range(COUNT)]
        self.keys[4] = self.keys[1] + 0.01 * random(2, D_IN)  # about the same subjects
        self.present = [k + 0.1 * random(*k.shape) for k in self.keys]
        self.wanted = [random(len(k), D_OUT) for k in self.keys]

    def dense(self, without: int, history: bool) -> list[Tensor]:
        """The change of each edit by normal equations, one after another, without one of them."""
        weight, changes, cost = self.weight.clone(), [], self.covariance.clone()
        for i in range(COUNT):
            if i == without:
                continue
            keys = self.keys[i]
            residuals = self.wanted[i] - self.present[i] @ weight.T
            gram = cost + keys.T @ keys
            changes.append(torch.linalg.solve(gram, keys.T @ residuals).T)
            weight = weight + changes[-1]
            cost = cost + keys.T @ keys if history else cost
        return changes


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("gone", range(COUNT))
def test_later_edits_are_those_of_a_stream_that_never_had_it(gone: int, history: bool) -> None:
    stream = Stream()
    weight, equations, changes = stream.weight, [], []
    prior = covariance_prior(torch.linalg.cholesky(stream.covariance))

    def cost(before: list[int]):
        keys = [stream.keys[i].T for i in before]
        return with_history(prior, torch.cat(keys, 1)) if history and keys else prior

    for i in range(COUNT):
        residuals = stream.wanted[i] - stream.present[i] @ weight.T
        equations.append(Equation(stream.keys[i], stream.present[i], residuals))
        delta = ridge_update(stream.keys[i].T, residuals.T, cost([*range(i)]), 1.0)
        changes.append(delta.dense)
        weight = weight + changes[-1]

    missing, found = changes[gone], changes[:gone]
    for i in range(gone + 1, COUNT):
        equation = equations[i].without(missing)
        before = [j for j in range(i) if j != gone]
        delta = ridge_update(equation.keys.T, equation.residuals.T, cost(before), 1.0).dense
        missing = missing + changes[i] - delta
        found.append(delta)
    for ours, oracle in zip(found, stream.dense(gone, history), strict=True):
        assert torch.allclose(ours, oracle, rtol=0, atol=1e-9)


def test_a_change_that_is_absent_leaves_an_equation() -> None:
    equation = Equation(random(2, 4), random(2, 4), random(2, 3))
    assert equation.without(None) is equation
    read = Equation.of(equation.tensors("m", torch.float64), "m", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(read, equation, strict=True))
