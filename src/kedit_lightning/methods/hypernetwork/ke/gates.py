"""The edit of KnowledgeEditor: the gradient behind a rank-one gate, as low-rank factors.

With the gradient of a request as ``Σ_t δ_t u_tᵀ`` the edit of a weight ``[d_out, d_in]`` is

    s·σ(η) · ((Σ_t δ_t u_tᵀ) ⊙ A + B),   A = softmax(α) βᵀ,   B = softmax(γ) δᵀ,

equal to ``s·σ(η) · (Σ_t (softmax(α) ⊙ δ_t)(β ⊙ u_t)ᵀ + softmax(γ) δᵀ)``: neither the
gradient nor the gate is ever built at the size of the weight.

Source: De Cao et al. 2021, "Editing Factual Knowledge in Language Models", section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_lightning.edits import LowRankDelta
from kedit_lightning.methods.shared.gradient_factors import Factors


@dataclass(frozen=True)
class Gates:
    """Gates and biases of the gradient of one projection, for each request.

    Args:
        out: ``softmax(α)``, the gate of each output. Shape ``[requests, d_out]``.
        into: ``β``, the signed gate of each input. Shape ``[requests, d_in]``.
        added_out: ``softmax(γ)``, output factor of the bias ``B``. Shape ``[requests, d_out]``.
        added_into: ``δ``, input factor of the bias ``B``. Shape ``[requests, d_in]``.
        strength: ``s·σ(η)``, scale of the edit. Shape ``[requests]``.
    """

    out: Tensor
    into: Tensor
    added_out: Tensor
    added_into: Tensor
    strength: Tensor

    @classmethod
    def from_values(cls, values: Tensor, d_in: int, d_out: int, scale: float) -> Gates:
        """Gates of strength up to ``scale`` from ``α, β, γ, δ, η`` of each request.

        ``values`` have the shape ``[requests, 2(d_in + d_out) + 1]``.
        """
        out, into, added_out, added_into, eta = values.split([d_out, d_in, d_out, d_in, 1], -1)
        strength = scale * eta[:, 0].sigmoid()
        return cls(out.softmax(-1), into, added_out.softmax(-1), added_into, strength)


def gated_delta(factors: Factors, gates: Gates, edit_of_row: Tensor) -> tuple[LowRankDelta, Tensor]:
    """The delta of one projection: a rank-one term for each token, and one for each request.

    Args:
        factors: Factors of the requests' gradients, a row for each request.
        gates: Gates of the requests.
        edit_of_row: Number of the edit that each request belongs to. Shape ``[requests]``.

    Returns:
        The delta, and the number of the edit that each of its terms belongs to, ``[rank]``.
    """
    inputs, gradients = (x.to(gates.into) for x in (factors.inputs, factors.gradients))
    rows, edits = (x.to(gates.into.device) for x in (factors.rows, edit_of_row))
    a = torch.cat([gates.into[rows] * inputs, gates.added_into])
    b = torch.cat([gates.out[rows] * gradients, gates.added_out])
    strength = torch.cat([gates.strength[rows], gates.strength])
    return LowRankDelta(a, (strength[:, None] * b).T), torch.cat([edits[rows], edits])
