"""Costs of edits: bytes, seconds, memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit_lightning.metrics.scores.case_mean import CaseMean


class CostMean(CaseMean):
    """Mean cost of an edit, such as seconds or bytes; median and 95th percentile beside it.

    >>> cost = CostMean()
    >>> cost.update([1.0, 2.0, 3.0, 10.0])
    >>> cost.compute(), cost.extras(cost.cases().values)["median"]
    (tensor(4.), 2.5)
    """

    higher_is_better = False

    def extras(self, values: Tensor) -> dict[str, float]:
        """Median and 95th percentile of the values ``[cases]``."""
        half, high = torch.quantile(values, torch.tensor([0.5, 0.95], dtype=values.dtype)).tolist()
        return {"median": half, "p95": high}
