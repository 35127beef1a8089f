"""The losses of SERAC's two networks: Mitchell et al. 2022, section 3.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kedit_lightning.base_models import BaseModel
from kedit_lightning.base_models.rows import RowEncoder, join_text
from kedit_lightning.base_models.taps import capture, stop_after
from kedit_lightning.chat_turns import question_in
from kedit_lightning.edits.kinds.scope.counterfactual import LanguageModel
from kedit_lightning.edits.kinds.scope.scope_networks import ScopeNetworks
from kedit_lightning.image_reference import Image
from kedit_lightning.methods.training.episodes import probes_of
from kedit_lightning.requests import EditExample, EditRequest

#: Smallest squared distance in the loss of pairs out of scope, which is infinite at 0.
_LEAST = 1e-4
#: Squared distance of a similarity of 0.5.
_EDGE = 0.6931471805599453
_NO_LABEL = -100
#: A prompt and its picture.
Question: TypeAlias = tuple[str, Image | None]


def counterfactual_encoder(base: BaseModel, networks: ScopeNetworks) -> RowEncoder:
    """The encoder with the counterfactual model's tokenizer, without chat template."""
    model = networks.decoder
    own = networks.plan.own_tokens and isinstance(model, LanguageModel)
    return base.encoder.of(model.tokenizer if own else base.tokenizer)


def end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The end-of-sequence id, which ends statements and answers; empty where there is none."""
    end = tokenizer.eos_token_id
    return () if end is None else (int(end),)


def statement_ids(encoder: RowEncoder, request: EditRequest) -> tuple[int, ...]:
    """Token ids of an edit's statement with its separator: ``prompt answer <eos>``.

    The statement is no turn of a chat, so it stays outside the chat template.
    """
    statement = join_text(question_in(request.prompt), request.target_new)
    return (*encoder.encode(statement).prompt, *end_ids(encoder.tokenizer))


@torch.no_grad()
def prompt_hidden_states(
    base: BaseModel, prompts: Sequence[str], module: str, images: Sequence[Image | None] = ()
) -> tuple[Tensor, Tensor]:
    """Hidden states ``[batch, tokens, hidden]`` that a block returns, and their attention mask.

    Tokens that stand for pictures are among them.
    """
    rows = base.rows(prompts, images=images or None)
    with capture(base.model, [module]) as captured, stop_after(base.model, module):
        base.forward(rows)
    return captured.outputs[module], rows.attention_mask


def question_of(example: EditExample) -> Question:
    """What the edit of an example answers."""
    return example.requests[0].prompt, example.requests[0].image


@dataclass(frozen=True)
class LossSums:
    """Sums of losses over pairs and tokens; the sums of ranks add up to those of all.

    Shape ``[4]`` each: ``losses``, sums of cross-entropies; ``hits``, numbers of pairs classified
    as in scope at a threshold of 0.5, and of arg-max tokens; ``counts`` of pairs and tokens. The
    entries are of: pairs of an edit and a question in its scope; pairs of an edit and a question
    labelled out of its scope; pairs of an edit and a question about another fact; and tokens of the
    new answers.
    """

    losses: Tensor
    hits: Tensor
    counts: Tensor

    @classmethod
    def of(cls, kinds: Sequence[tuple[Tensor, Tensor]]) -> LossSums:
        """Sum losses and hits. Shape ``[n]`` each, another ``n`` for each entry."""
        return cls(
            torch.stack([losses.sum() for losses, _ in kinds]),
            torch.stack([hits.sum() for _, hits in kinds]),
            torch.tensor([len(losses) for losses, _ in kinds]).to(kinds[0][0].device),
        )


def loss_weights(counts: Tensor, c_edit: float, c_loc: float) -> Tensor:
    """Weights ``[4]``, float64, of the sums in the loss, from the counts ``[4]`` of all ranks.

    The loss of the classifier, with weight ``c_loc``, is the mean of the mean loss in scope and of
    that out of scope, which is the mean over the kinds of pairs that occur.
    """
    inside, near, far, answers = counts.tolist()
    outside = (near > 0) + (far > 0)
    half = c_loc / 2 if outside else c_loc
    shares = (half, half / max(outside, 1), half / max(outside, 1), c_edit)
    pairs = zip(shares, (inside, near, far, answers), strict=True)
    return torch.tensor([share / max(n, 1) for share, n in pairs], dtype=torch.float64)


def inside_loss(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``exp(-d)`` for pairs in scope, and true positives. ``[n]`` each."""
    return distances, (distances < _EDGE).to(distances)


def outside_loss(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``exp(-d)`` for pairs out of scope, and false positives. ``[n]`` each."""
    # log(1 - exp(-d)), without loss of digits for small d.
    losses = -torch.log(-torch.expm1(-distances.clamp(min=_LEAST)))
    return losses, (distances < _EDGE).to(distances)


def loss_sums(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    facts: Sequence[Question],
) -> LossSums:
    """Losses of examples. Rephrases are in the scope of their own edit, and of no other.

    Args:
        base: The base model; no edit should be in force.
        networks: The networks.
        examples: The examples, at least one.
        facts: Questions of all edits of the batch, on whatever rank. Two examples may write the
            same question: their rephrases are in the scope of both.
    """
    inside, near, far = _distances(base, networks, examples, facts)
    answers = _answer_losses(base, networks, examples)
    return LossSums.of([inside_loss(inside), outside_loss(near), outside_loss(far), answers])


def _distances(
    base: BaseModel,
    networks: ScopeNetworks,
    examples: Sequence[EditExample],
    facts: Sequence[Question],
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of the three kinds of pairs of :class:`LossSums`. ``[n]`` each."""
    edits = [question_of(example) for example in examples]
    inside, near = ([probes_of([e], kind) for e in examples] for kind in ("rephrase", "locality"))
    questions = [(probe.prompt, probe.image) for probes in (*inside, *near) for probe in probes]
    prompts = list(dict.fromkeys([*facts, *edits]))
    texts, images = zip(*prompts, *questions, strict=True)
    hidden, mask = prompt_hidden_states(base, texts, networks.plan.module, images)
    embeddings = networks.embed(hidden, mask)
    keys = embeddings[: len(prompts)]
    distances = networks.distances(embeddings[len(prompts) :], keys)

    column = {prompt: number for number, prompt in enumerate(prompts)}

    def columns(asked: Sequence[Question]) -> Tensor:
        return torch.tensor([column[one] for one in asked], dtype=torch.long, device=keys.device)

    count, pairs = sum(map(len, inside)), zip(edits * 2, (*inside, *near), strict=True)
    own = columns([edit for edit, probes in pairs for _ in probes])
    of_own = distances.gather(1, own[:, None])[:, 0]
    all_facts = columns(facts)
    others = distances[:count][:, all_facts][all_facts[None] != own[:count, None]]
    return of_own[:count], of_own[count:], others


def counterfactual_rows(
    base: BaseModel, networks: ScopeNetworks, examples: Sequence[EditExample]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """``statement <eos> question answer <eos>`` for each question that must follow its edit.

    Returns:
        Token ids of each row, and the number of tokens of its answer, with its end.
    """
    rows, answers, encoder = [], [], counterfactual_encoder(base, networks)
    end, own_tokens = end_ids(encoder.tokenizer), networks.plan.own_tokens
    suffix = base.encoder.suffix if base.is_encoder_decoder and not own_tokens else ()
    for example in examples:
        statement = statement_ids(encoder, example.requests[0])
        for probe in (*probes_of([example], "rewrite"), *probes_of([example], "rephrase")):
            # With the base model's tokenizer, questions are encoded as for the base model.
            question = (
                encoder.encode(probe.prompt, probe.answers[0])
                if own_tokens
                else base.encode(probe.prompt, probe.answers[0], image=probe.image)
            )
            rows.append((*statement, *question.prompt, *suffix, *question.answer, *end))
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
