"""Groups of requests whose passes run together."""

from __future__ import annotations

from itertools import permutations

import pytest

from kedit_lightning.base_models.rows import EncodedRow
from kedit_lightning.methods.shared.row_groups import OVERHEAD, PassSize, partition

SIZES = [
    PassSize(rows=21, width=width, head=head, places=21)
    for width, head in [(2, 9), (7, 3), (3, 9), (2, 1), (12, 8), (3, 4), (8, 2)]
]


def cost(group: list[int]) -> int:
    return OVERHEAD + sum(SIZES[i].rows for i in group) * max(SIZES[i].width for i in group)


def taken(group: list[int], token: int, head: int, place: int) -> int:
    width, longest = (max(getattr(SIZES[i], n) for i in group) for n in ("width", "head"))
    rows, places = (sum(getattr(SIZES[i], n) for i in group) for n in ("rows", "places"))
    return rows * (width * token + (width + longest) * head) + places * place


@pytest.mark.parametrize("budget", [10**9, 60_000, 20_000, 1])
def test_groups_have_the_least_padding_that_memory_allows(budget):
    given = 100, 10, 50
    groups = partition(SIZES, *given, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(SIZES)))
    assert all(len(group) == 1 or taken(group, *given) <= budget for group in groups)
    # Every way to cut every order of the requests, by the bits of a number.
    best = float("inf")
    ordered = sorted(range(len(SIZES)), key=lambda i: (SIZES[i].width, SIZES[i].head, i))
    for bits in range(1 << (len(SIZES) - 1)):
        cuts = [i + 1 for i in range(len(SIZES) - 1) if bits >> i & 1]
        ways = [ordered[a:b] for a, b in zip([0, *cuts], [*cuts, len(SIZES)], strict=True)]
        if all(len(way) == 1 or taken(way, *given) <= budget for way in ways):
            best = min(best, sum(map(cost, ways)))
    assert sum(map(cost, groups)) == best
    if budget == 10**9:
        assert 1 < len(groups) < len(SIZES)


def test_groups_do_not_depend_on_the_order_of_requests():
    lengths = [PassSize(16, width, 5, 16) for width in (2, 9, 4, 17)]
    for order in permutations(range(4)):
        groups = partition([lengths[i] for i in order], 1, 1, 1, 10**9)
        found = [sorted(lengths[order[i]].width for i in group) for group in groups]
        assert found == [[2, 4], [9], [17]]


def test_sizes_count_what_runs_in_each_pass():
    rows = [
        EncodedRow((1, 2, 3, 4, 5), (6, 7), subject_end=3, subject_start=2),
        EncodedRow((1, 2), (), subject_end=1, subject_start=1),
    ]
    assert PassSize.of(rows, resumed=True) == PassSize(rows=2, width=3, head=3, places=3)
    assert PassSize.of(rows, resumed=False) == PassSize(rows=2, width=6, head=0, places=3)
    assert partition([], 1, 1, 1, 1) == []
