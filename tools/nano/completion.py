"""Share of facts that a model completes greedily: every answer token is the arg-max."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fact_book import Fact, FactBook
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def completed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    batch: int = 128,
) -> list[bool]:
    """Whether the model continues each prompt with its answer.

    Args:
        model: any causal language model.
        tokenizer: adds ``<s>`` by itself.
        pairs: prompts and answers; the answer follows a space.
        batch: rows of a forward pass.

    Returns:
        One truth value a pair.
    """
    rows: list[tuple[int, list[int], int]] = []
    for index, (prompt, answer) in enumerate(pairs):
        head = tokenizer(prompt).input_ids
        tail = tokenizer(" " + answer, add_special_tokens=False).input_ids
        rows.append((index, head + tail, len(head)))
    rows.sort(key=lambda row: len(row[1]))
    right = [False] * len(rows)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(rows), batch):
            part = rows[begin : begin + batch]
            width = max(len(ids) for _, ids, _ in part)
            # Padding stands on the right, where causal attention never looks back at it.
            ids = torch.tensor(
                [row + [0] * (width - len(row)) for _, row, _ in part], device=model.device
            )
            best = model(input_ids=ids).logits[:, :-1].argmax(-1).cpu()
            for row, (index, tokens, cut) in enumerate(part):
                got = best[row, cut - 1 : len(tokens) - 1]
                right[index] = got.tolist() == tokens[cut:]
    model.train(was_training)
    return right


def fact_pairs(
    facts: Sequence[Fact], book: FactBook, kind: str, index: int
) -> list[tuple[str, str]]:
    """Prompts and answers of facts under the ``index``-th template of a kind."""
    return [(book.templates[f.relation][kind][index].format(f.subject), f.object) for f in facts]


def report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    book: FactBook,
    facts: Sequence[Fact],
) -> dict[str, float]:
    """Share completed with the first training template and with each held-out one."""
    out = {}
    for name, kind, index in (
        ("train", "train", 0),
        ("held_out_1", "held_out", 0),
        ("held_out_2", "held_out", 1),
    ):
        right = completed(model, tokenizer, fact_pairs(facts, book, kind, index))
        out[name] = sum(right) / len(right)
    out["held_out"] = (out["held_out_1"] + out["held_out_2"]) / 2
    return out
