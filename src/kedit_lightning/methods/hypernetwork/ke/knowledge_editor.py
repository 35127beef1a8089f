"""The hypernetwork of KnowledgeEditor: from the text of a request to the gates of its gradient.

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
from kedit_lightning.chat_turns import question_in
from kedit_lightning.methods.hypernetwork.ke.divergence_bound import DivergenceBound
from kedit_lightning.methods.hypernetwork.ke.gates import Gates, gated_delta
from kedit_lightning.methods.hypernetwork.shared.editor_network import (
    BatchedDeltas,
    EditorNetwork,
    ProjectionPlan,
)
from kedit_lightning.methods.shared.gradient_factors import Factors
from kedit_lightning.requests import EditRequest
from kedit_lightning.sentence import answer_text

#: Most tokens of the base model's own answer in a condition.
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class EditorPlan(ProjectionPlan):
    """Architecture of the hypernetwork of KnowledgeEditor.

    Args:
        modules: Names of the edited projections, in order.
        hidden: Hidden width of the LSTM in each direction, and of the conditioners.
        condition: Width of the condition vector.
        max_scale: Largest scale of an edit.
    """

    hidden: int = 128
    condition: int = 1024
    max_scale: float = 1.0


def condition_texts(base: BaseModel, requests: Sequence[EditRequest]) -> list[str]:
    """The condition of each request: ``old answer >> new answer || prompt``.

    The old answer is the request's ``target_old`` where it has one, as that is the answer to
    replace and costs nothing; otherwise it is the base model's present answer, as in the paper.
    """
    unknown = [request for request in requests if request.target_old is None]
    prompts, images = [r.prompt for r in unknown], [r.image for r in unknown]
    answers = iter(base.generate(prompts, ANSWER_TOKENS, stop_at_sentence=True, images=images))
    texts = []
    for request in requests:
        old = answer_text(next(answers)) if request.target_old is None else request.target_old
        texts.append(
            f"{old.strip()} >> {request.target_new.strip()} || {question_in(request.prompt)}"
        )
    return texts


def embedded(base: BaseModel, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Word embeddings of the base model; the networks hold no copy of the table.

    The released code trains a table that shares its storage with the base model's, and so changes
    the base model.

    Returns:
        Embeddings ``[texts, tokens, width]``, detached and padded on the right, and the number of
        tokens of each text ``[texts]``, on the CPU.
    """
    rows = base.pad([base.encoder.encode(text) for text in texts], "right")
    with torch.no_grad():
        embeddings = base.model.get_input_embeddings()(rows.inputs["input_ids"])
    return embeddings, rows.attention_mask.sum(-1).cpu()


class ConditionEncoder(nn.Module):
    """A bidirectional LSTM over word embeddings, whose last hidden states give a condition."""

    def __init__(self, width: int, hidden: int, condition: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=True, dtype=dtype)
        self.linear = nn.Linear(2 * hidden, condition, dtype=dtype)

    def forward(self, embeddings: Tensor, lengths: Tensor) -> Tensor:
        """Condition vectors, ``[texts, condition]``, from the output of :func:`embedded`."""
        packed = pack_padded_sequence(embeddings, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(packed)
        return self.linear(torch.cat([last[0], last[1]], -1)).tanh()  # type: ignore[no-any-return]


def conditioner(condition: int, hidden: int, count: int, dtype: torch.dtype) -> nn.Module:
    """A feed-forward network from a condition vector to ``count`` values of one projection."""
    return nn.Sequential(
        weight_norm(nn.Linear(condition, hidden, dtype=dtype)),
        nn.Tanh(),
        weight_norm(nn.Linear(hidden, count, dtype=dtype)),
    )


class KnowledgeEditor(EditorNetwork):
    """Encodes the text of requests, and gates their gradients; holds the constraint's multiplier.

    Args:
        plan: The architecture.
        shapes: ``(d_in, d_out)`` of each projection of the plan.
        width: Width of the base model's word embeddings.
        margin: Initial margin of the constraint.
        dtype: Number type of parameters and buffers.
        seed: Seed of the initial values.
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
        """Multiplier and margin of the constraint."""
        return {"multiplier": self.bound.multiplier.clone(), "margin": self.bound.margin.clone()}

    def gates(self, embeddings: Tensor, lengths: Tensor) -> dict[str, Gates]:
        """Gates by projection, from the output of :func:`embedded`."""
        vectors = self.encoder(embeddings.to(self.bound.margin), lengths)
        scale = self.plan.max_scale
        parts = zip(self.plan.modules, self.conditioners, self._shapes, strict=True)
        return {name: Gates.from_values(net(vectors), *shape, scale) for name, net, shape in parts}

    def deltas(
        self,
        base: BaseModel,
        requests: Sequence[EditRequest],
        factors: Mapping[str, Factors],
        edit_of_row: Tensor,
    ) -> BatchedDeltas:
        """Gated gradients, with gates from the requests' texts; see the base class."""
        texts = embedded(base, condition_texts(base, requests))
        deltas, edit_of_term = {}, {}
        with torch.autocast(self.bound.margin.device.type, enabled=False):
            for name, gates in self.gates(*texts).items():
                deltas[name], edit_of_term[name] = gated_delta(factors[name], gates, edit_of_row)
        return deltas, edit_of_term
