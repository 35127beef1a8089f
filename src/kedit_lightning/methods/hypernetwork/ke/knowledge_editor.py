"""The networks of KnowledgeEditor: from the text of a request to the gates of its gradient.

Source: De Cao et al. 2021, "Editing Factual Knowledge in Language Models", section 4.2 and
appendix A, and the released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence

from kedit_lightning.base_models import BaseModel
from kedit_lightning.methods.hypernetwork.ke.divergence_bound import DivergenceBound
from kedit_lightning.methods.hypernetwork.ke.gates import Gates, gated_change
from kedit_lightning.methods.hypernetwork.shared.attach import LowRankChange
from kedit_lightning.methods.hypernetwork.shared.network import ProjectionPlan, ProposingNetwork
from kedit_lightning.methods.shared.gradient_factors import Factors
from kedit_lightning.metrics.functional.text_match import answer_text
from kedit_lightning.requests import EditRequest

#: Width of the LSTM, and of a conditioner's inner layer.
HIDDEN = 128
#: Width of what a request is turned into.
CONDITION = 1024
#: Tokens of the base model's own answer that a condition holds at most.
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class EditorPlan(ProjectionPlan):
    """The networks of KnowledgeEditor.

    Args:
        modules: The projections they edit, in order.
        hidden: Width of the LSTM in each direction, and of a conditioner's inner layer.
        condition: Width of what a request is turned into.
        max_scale: Largest strength of an edit.
    """

    hidden: int = HIDDEN
    condition: int = CONDITION
    max_scale: float = 1.0


def condition_texts(base: BaseModel, requests: Sequence[EditRequest]) -> list[str]:
    """What the networks read of each request: ``old answer >> new answer || prompt``.

    The old answer is the request's ``target_old`` where it has one, since that is what the edit is
    to replace and costs nothing; otherwise it is what the base model says now, as in the paper.
    """
    unknown = [request.prompt for request in requests if request.target_old is None]
    said = iter(base.generate(unknown, ANSWER_TOKENS, stop_at_sentence=True) if unknown else [])
    texts = []
    for request in requests:
        old = answer_text(next(said)) if request.target_old is None else request.target_old
        texts.append(f"{old.strip()} >> {request.target_new.strip()} || {request.prompt}")
    return texts


def embedded(base: BaseModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Word embeddings of the base model, looked up: the networks hold no copy of the table.

    The released code trains a table that shares its storage with the base model's, and so changes
    the base model.

    Returns:
        Embeddings ``[texts, tokens, width]`` without autograd history, padded on the right, and
        the number of tokens of each text ``[texts]``, on the CPU.
    """
    rows = base.pad([base.encoder.encode(text) for text in texts], "right")
    with torch.no_grad():
        embeddings = base.model.get_input_embeddings()(rows.inputs["input_ids"])
    return embeddings, rows.attention_mask.sum(-1).cpu()


class ConditionEncoder(nn.Module):
    """A bidirectional LSTM over word embeddings, whose last states become one vector.

    Args:
        width: Width of the embeddings.
        hidden: Width of the LSTM in each direction.
        condition: Width of the vector.
        dtype: Number type of the parameters.
    """

    def __init__(self, width: int, hidden: int, condition: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True, dtype=dtype)
        self.linear = nn.Linear(2 * hidden, condition, dtype=dtype)

    def forward(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """``[texts, condition]`` from ``[texts, tokens, width]`` and ``[texts]``."""
        packed = pack_padded_sequence(embeddings, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.linear(torch.cat([last[0], last[1]], -1)).tanh()  # type: ignore[no-any-return]


def conditioner(condition: int, hidden: int, count: int, dtype: torch.dtype) -> nn.Module:
    """From the vector of a request to the numbers that gate one projection.

    Args:
        condition: Width of the vector.
        hidden: Width of the inner layer.
        count: Numbers to give.
        dtype: Number type of the parameters.
    """
    return nn.Sequential(
        weight_norm(nn.Linear(condition, hidden, dtype=dtype)),
        nn.Tanh(),
        weight_norm(nn.Linear(hidden, count, dtype=dtype)),
    )


class KnowledgeEditor(ProposingNetwork):
    """Reads requests and gates their gradients, within a bound on what else may change.

    Args:
        plan: What it is made of.
        shapes: ``(d_in, d_out)`` of each projection of the plan.
        width: Width of the base model's word embeddings.
        margin: Divergence that the bound allows to begin with.
        dtype: Number type of parameters and buffers.
        seed: Fixes the starting values.
    """

    plan: EditorPlan

    def __init__(
        self,
        plan: EditorPlan,
        shapes: Sequence[tuple[int, int]],
        width: int,
        margin: float,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(plan)
        self._shapes = list(shapes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = ConditionEncoder(width, plan.hidden, plan.condition, dtype)
            self.conditioners = nn.ModuleList(
                conditioner(plan.condition, plan.hidden, 2 * (d_in + d_out) + 1, dtype)
                for d_in, d_out in self._shapes
            )
        self.bound = DivergenceBound(margin, dtype)

    def scalars(self) -> dict[str, Tensor]:
        """The state of the bound."""
        return {"multiplier": self.bound.multiplier.clone(), "margin": self.bound.margin.clone()}

    def gates(self, embeddings: Tensor, lengths: Tensor) -> dict[str, Gates]:
        """Gates by projection, from embedded texts as :func:`embedded` gives them."""
        vectors = self.encoder(embeddings.to(self.bound.margin), lengths)
        scale = self.plan.max_scale
        parts = zip(self.plan.modules, self.conditioners, self._shapes, strict=True)
        return {name: Gates.from_values(net(vectors), *shape, scale) for name, net, shape in parts}

    def propose(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        factors: Mapping[str, Factors],
        edit_of_row: Tensor,
    ) -> dict[str, LowRankChange]:
        """Gate the gradient of each request as its text asks for; see the base class."""
        texts = embedded(base, condition_texts(base, requests))
        with torch.autocast(self.bound.margin.device.type, enabled=False):
            gates = self.gates(*texts)
            return {n: gated_change(factors[n], own, edit_of_row) for n, own in gates.items()}
