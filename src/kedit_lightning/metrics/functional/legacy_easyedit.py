"""Scores as EasyEdit (July 2026) computes them, so that its published numbers can be matched.

All of them are teacher-forced, and locality asks for unchanged tokens, not for right ones. Text to
tokens is the caller's: EasyEdit joins prompt and target by one space and takes the length of the
prompt from the prompt tokenised alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import Tensor

from kedit_lightning.metrics.functional.teacher_forcing import token_match

# Predicted or earlier ids, target or later ids, and the mask of the positions compared.
Rows: TypeAlias = tuple[Tensor, Tensor, Tensor]
# ``rewrite_acc`` and ``rephrase_acc`` hold lists, ``locality`` and ``portability`` lists by group.
Sample: TypeAlias = Mapping[str, Sequence[float] | Mapping[str, Sequence[float]]]


def rewrite_acc(predicted: Tensor, target: Tensor, mask: Tensor) -> list[float]:
    """Share of target tokens that are arg-max, one number a prompt.

    Rows with an empty target are dropped, so the list may be shorter than the rows.

    Args:
        predicted: Arg-max ids at the positions that predict the target. Shape ``[rows, tokens]``.
        target: Ids of the target. Shape ``[rows, tokens]``.
        mask: True where ``target`` holds a token. Shape ``[rows, tokens]``.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.

    >>> import torch
    >>> predicted, target = torch.tensor([[5, 7], [1, 1]]), torch.tensor([[5, 8], [1, 1]])
    >>> rewrite_acc(predicted, target, torch.tensor([[True, True], [False, False]]))
    [0.5]
    """
    shares = token_match(predicted, target, mask)
    return [float(share) for share in shares[~shares.isnan()]]


def rephrase_acc(predicted: Tensor, target: Tensor, mask: Tensor) -> list[float]:
    """:func:`rewrite_acc` on the rephrased prompts."""
    return rewrite_acc(predicted, target, mask)


def locality(groups: Mapping[str, Rows]) -> dict[str, list[float]]:
    """Share of positions whose arg-max the edit left as it was, by group, one number a prompt.

    The answer of a locality prompt only fixes which positions are compared; whether it is right
    plays no part.

    Args:
        groups: For each group the arg-max ids before, those after, and the mask of the answer's
            positions. Shapes ``[rows, tokens]``.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.

    >>> import torch
    >>> before, after = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[3, 4, 5, 9]])
    >>> locality({"neighborhood": (before, after, torch.ones(1, 4))})
    {'neighborhood_acc': [0.75]}
    """
    return {
        f"{group}_acc": rewrite_acc(after, before, mask)
        for group, (before, after, mask) in groups.items()
    }


def portability(groups: Mapping[str, Rows]) -> dict[str, list[float]]:
    """:func:`rewrite_acc` on the portability prompts, by group.

    Args:
        groups: For each group the arg-max ids, the target ids and their mask. Shapes
            ``[rows, tokens]``.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.
    """
    return {f"{group}_acc": rewrite_acc(*rows) for group, rows in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def summary(samples: Sequence[Sample]) -> dict[str, float | dict[str, float]]:
    """Mean over samples of each sample's mean over prompts, groups apart.

    A sample without prompts of a kind or group does not count for it.

    Args:
        samples: Scores of each sample, keyed as the functions here name them.

    >>> summary(
    ...     [
    ...         {"rewrite_acc": [1.0], "locality": {"loc_acc": [1.0, 0.0]}},
    ...         {"rewrite_acc": [0.5], "locality": {"loc_acc": [1.0]}},
    ...     ]
    ... )
    {'rewrite_acc': 0.75, 'locality': {'loc_acc': 0.75}}
    """
    flat: dict[str, list[float]] = {}
    grouped: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        for kind, scores in sample.items():
            if isinstance(scores, Mapping):
                for group, values in scores.items():
                    if values:
                        grouped.setdefault(kind, {}).setdefault(group, []).append(_mean(values))
            elif scores:
                flat.setdefault(kind, []).append(_mean(scores))
    means: dict[str, float | dict[str, float]] = {
        key: _mean(values) for key, values in flat.items()
    }
    for kind, groups in grouped.items():
        means[kind] = {group: _mean(values) for group, values in groups.items()}
    return means
