"""Changes of projections, in all their parts."""

from __future__ import annotations

import torch
from torch import nn

from kedit_lightning.edits import LowRankDelta
from kedit_lightning.edits.effects import WeightDelta


def test_all_parts_of_a_change_count_in_whatever_form_it_is_asked_for():
    a, b = torch.randn(2, 4).double(), torch.randn(3, 2).double()
    dense, bias = torch.randn(3, 4).double(), torch.randn(3).double()
    delta = WeightDelta(LowRankDelta(a, b)).plus(WeightDelta(None, dense, bias))
    delta = delta.plus(WeightDelta(LowRankDelta(a, b), None, bias))
    whole, x = 2 * b @ a + dense, torch.randn(5, 4).double()
    torch.testing.assert_close(delta.matrix(), whole)
    torch.testing.assert_close(delta.change(x), x @ whole.T + 2 * bias)
    found = delta.of_parameters(nn.Linear(4, 3))
    torch.testing.assert_close(found, {"weight": whole, "bias": 2 * bias})
    assert WeightDelta(bias=bias).matrix() is None
