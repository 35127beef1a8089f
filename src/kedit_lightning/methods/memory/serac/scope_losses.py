"""What SERAC's two networks learn from: the losses of Mitchell et al. 2022, section 3.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import RowEncoder, join_text
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks
from kedit_lightning.methods.training.episodes import probes_of
from kedit_lightning.requests import EditExample, EditRequest, Probe

#: Least squared distance in the loss of questions out of scope: at 0 it would be infinite.
_LEAST = 1e-4
#: Squared distance at which a question is as much in scope as out of it.
_EDGE = 0.6931471805599453
_NO_LABEL = -100


def reader_of(base: BaseModel, networks: ScopeNetworks) -> RowEncoder:
    """What turns texts into tokens of the counterfactual model, outside of any chat."""
    model = networks.decoder
    own = networks.plan.own_tokens and isinstance(model, LanguageModel)
    return base.encoder.of(model.tokenizer if own else base.tokenizer)


def ending(tokenizer: Any) -> tuple[int, ...]:
    """The id that separates a statement from its question, and that ends an answer, if any."""
    end = tokenizer.eos_token_id
    return () if end is None else (int(end),)


def statement_ids(reader: RowEncoder, request: EditRequest) -> tuple[int, ...]:
    """Token ids of an edit's statement, with the separator behind: ``prompt answer <eos>``.

    The statement is no turn of a chat, so it stays outside the chat template.
    """
    stated = join_text(request.prompt, request.target_new)
    return (*reader.encode(stated).prompt, *ending(reader.tokenizer))


@torch.no_grad()
def read_prompts(base: BaseModel, prompts: Sequence[str], module: str) -> tuple[Tensor, Tensor]:
    """Output of a block for some prompts, and where it counts.

    Returns:
        Shapes ``[batch, tokens, width]`` and ``[batch, tokens]``.
    """
    rows = base.rows(prompts)
    with capture(base.model, [module]) as seen, stop_after(base.model, module):
        base.forward(rows)
    return seen.outputs[module], rows.attention_mask


@dataclass(frozen=True)
class Tally:
    """Losses summed, by what they are of; sums of several ranks add up to those of all.

    The four kinds are: pairs of an edit and a question in its scope; pairs of an edit and a
    question that was chosen to be out of its scope; pairs of an edit and a question about another
    fact; and tokens of the new answers. Shape ``[4]`` each.

    Args:
        losses: Cross-entropy of each kind, summed.
        noted: Pairs that are taken to be in scope at a threshold of 0.5, and tokens that are
            arg-max.
        counts: Number of pairs and of tokens.
    """

    losses: Tensor
    noted: Tensor
    counts: Tensor

    @classmethod
    def of(cls, kinds: Sequence[tuple[Tensor, Tensor]]) -> Tally:
        """Sum losses and what is noted. Shape ``[n]`` each, another ``n`` for each kind."""
        return cls(
            torch.stack([losses.sum() for losses, _ in kinds]),
            torch.stack([noted.sum() for losses, noted in kinds]),
            torch.tensor([len(losses) for losses, _ in kinds]).to(kinds[0][0].device),
        )


def loss_weights(counts: Tensor, c_edit: float, c_loc: float) -> Tensor:
    """Weights that make the loss of sums: each kind of pair counts as a whole.

    The loss of the classifier is the mean of that in scope and of that out of scope, which is the
    mean over the kinds that occur.

    Args:
        counts: The counts of a tally, over all ranks. Shape ``[4]``.
        c_edit: Weight of the loss of the new answers.
        c_loc: Weight of the loss of the classifier.

    Returns:
        Shape ``[4]``, float64.
    """
    inside, near, far, answers = counts.tolist()
    outside = (near > 0) + (far > 0)
    half = c_loc / 2 if outside else c_loc
    shares = (half, half / max(outside, 1), half / max(outside, 1), c_edit)
    pairs = zip(shares, (inside, near, far, answers), strict=True)
    return torch.tensor([share / max(n, 1) for share, n in pairs], dtype=torch.float64)


def inside_loss(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``exp(-d)`` for pairs in scope, and which are recognised. ``[n]`` each."""
    return distances, (distances < _EDGE).to(distances)


def outside_loss(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``exp(-d)`` for pairs out of scope, and false alarms. ``[n]`` each."""
    # log(1 - exp(-d)), without loss of digits for small d.
    losses = -torch.log(-torch.expm1(-distances.clamp(min=_LEAST)))
    return losses, (distances < _EDGE).to(distances)


def tally(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    facts: Sequence[str],
) -> Tally:
    """What examples cost. Rephrases are in the scope of their own edit, and of no other fact's.

    Args:
        base: The base model; no edit should be in force.
        networks: The networks.
        examples: The examples, at least one.
        facts: Prompts of all edits of the batch, on whatever rank. Two examples may write the same
            prompt: their rephrases are in the scope of both.
    """
    inside, near, far = _distances(base, networks, examples, facts)
    answers = _answer_losses(base, networks, examples)
    return Tally.of([inside_loss(inside), outside_loss(near), outside_loss(far), answers])


def _distances(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    facts: Sequence[str],
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances in scope, from chosen questions and from other facts. ``[n]`` each."""
    own = [example.requests[0].prompt for example in examples]
    inside, near = ([probes_of([e], kind) for e in examples] for kind in ("rephrase", "locality"))
    asked = [probe.prompt for probes in (*inside, *near) for probe in probes]
    prompts = list(dict.fromkeys([*facts, *own]))
    hidden, mask = read_prompts(base, [*prompts, *asked], networks.plan.module)
    placed = networks.embed(hidden, mask)
    keys, questions = placed[: len(prompts)], placed[len(prompts) :]
    distances = networks.distances(questions, keys)

    place = {prompt: number for number, prompt in enumerate(prompts)}

    def owners(probes_of_each: Sequence[Sequence[Probe]]) -> Tensor:
        of = [place[p] for p, probes in zip(own, probes_of_each, strict=True) for _ in probes]
        return torch.tensor(of, dtype=torch.long, device=keys.device)

    count = sum(map(len, inside))
    owner, owner_near = owners(inside), owners(near)
    at = torch.arange(len(questions), device=keys.device)
    columns = torch.tensor([place[prompt] for prompt in facts], device=keys.device)
    others = distances[:count][:, columns]
    return (
        distances[at[:count], owner],
        distances[at[count:], owner_near],
        others[columns[None] != owner[:, None]],
    )


def counterfactual_rows(
    base: BaseModel, networks: ScopeNetworks, examples: Sequence[EditExample]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """``statement <eos> question answer <eos>`` for each question that must follow its edit.

    Returns:
        Token ids of each row, and the number of tokens that are its answer, with its end.
    """
    rows, answers, reader = [], [], reader_of(base, networks)
    end, own_tokens = ending(reader.tokenizer), networks.plan.own_tokens
    # Where tokens are the base model's, the question is passed on as the base model reads it.
    encode = reader.encode if own_tokens else base.encode
    behind = base.encoder.suffix if base.is_encoder_decoder and not own_tokens else ()
    for example in examples:
        statement = statement_ids(reader, example.requests[0])
        for probe in (*probes_of([example], "rewrite"), *probes_of([example], "rephrase")):
            question = encode(probe.prompt, probe.answers[0])
            rows.append((*statement, *question.prompt, *behind, *question.answer, *end))
            answers.append(len(question.answer) + len(end))
    return rows, answers


def _answer_losses(
    base: BaseModel, networks: ScopeNetworks, examples: Sequence[EditExample]
) -> tuple[Tensor, Tensor]:
    """Loss of each token of the new answers, and whether it is arg-max. ``[n]`` each."""
    rows, answers = counterfactual_rows(base, networks, examples)
    ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.long)
    labels = torch.full_like(ids, _NO_LABEL)
    for number, (row, count) in enumerate(zip(rows, answers, strict=True)):
        ids[number, : len(row)] = torch.tensor(row)
        labels[number, len(row) - 1 - count : len(row) - 1] = torch.tensor(row[-count:])
    embedding = base.model.get_input_embeddings().weight
    ids, labels = ids.to(embedding.device), labels.to(embedding.device)
    wanted = labels != _NO_LABEL
    logits = networks.answer_logits(ids, (wanted,), embedding)
    losses = cross_entropy(logits, labels[wanted], reduction="none").to(networks.dtype)
    return losses, (logits.argmax(-1) == labels[wanted]).to(losses)
