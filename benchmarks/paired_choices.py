"""The choices that papers make differently, and what each moves: pairs of scores of the same facts.

A pair differs in one choice alone. Scores are kept by case (fact, kind of probe, group, number of
the probe), so a difference is of the same questions about the same facts, and the facts are the
clusters of its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, NamedTuple, TypeAlias

from kedit_lightning.metrics.functional import paired_difference

#: Name of a case: fact, kind, group, number of the probe within its group.
Case: TypeAlias = tuple[str, str, str, int]
#: Panels of the picture: kind of probe, its group if only one counts, and the usual score.
PANELS = {
    "rewrite": ("rewrite", None, "exact"),
    "rephrase": ("rephrase", None, "exact"),
    "neighbours": ("locality", "neighborhood", "known"),
}


@dataclass(frozen=True)
class Cell:
    """One run: a method on some facts under one protocol.

    ``answers`` are the ``words`` of the records, which the model knows, or ``names`` of several
    tokens that it never saw. ``eos`` puts the end-of-text token behind each answer to write.
    """

    method: str
    facts: int
    answers: str = "words"
    eos: bool = False
    mode: str = "single"
    chunk: int = 1
    order: int = 0

    @property
    def name(self) -> str:
        """A file name."""
        values = [str(value) for value in asdict(self).values()]
        return "-".join(values).replace(":", "_").replace("/", "_").replace(" ", "")


@dataclass(frozen=True)
class Side:
    """One side of a pair: the mean over cells of a score, by case. No score: the panel's usual."""

    cells: tuple[Cell, ...]
    score: str | None = None
    stage: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Pair:
    """``second - first`` is what the choice moves; ``label`` names the method and the answers."""

    choice: str
    label: str
    first: Side
    second: Side
    panels: tuple[str, ...] = ("rewrite", "rephrase", "neighbours")

    @property
    def scores_alone(self) -> bool:
        """Whether both sides are scores of the same runs."""
        return self.first.cells == self.second.cells


class Moved(NamedTuple):
    """What a choice moves, in points, with the bounds of a 95 % interval."""

    mean: float
    low: float
    high: float
    cases: int


def moved(first: Mapping[Case, float], second: Mapping[Case, float]) -> Moved | None:
    """Mean of ``second - first`` in points over the cases that both have; ``None`` without any.

    >>> first = {("a", "rewrite", "", 0): 1.0, ("b", "rewrite", "", 0): 1.0}
    >>> moved(first, {case: 0.5 for case in first}).mean
    -50.0
    """
    shared = [case for case in first if case in second]
    if not shared:
        return None
    numbers = {fact: number for number, fact in enumerate(dict.fromkeys(c[0] for c in shared))}
    bounds = paired_difference(
        [second[case] for case in shared],
        [first[case] for case in shared],
        [numbers[case[0]] for case in shared],
    )
    return Moved(*(100 * bound for bound in bounds), len(shared))


def by_fact(values: Mapping[Case, float]) -> dict[Case, float]:
    """The mean over the cases of each fact, so that probes of two kinds can be paired.

    >>> by_fact({("a", "rephrase", "", 0): 1.0, ("a", "rephrase", "", 1): 0.0})
    {('a', '', '', 0): 0.5}
    """
    groups: dict[str, list[float]] = {}
    for case, value in values.items():
        groups.setdefault(case[0], []).append(value)
    return {(fact, "", "", 0): fmean(group) for fact, group in groups.items()}


def mean_of(maps: Sequence[Mapping[Case, float]]) -> dict[Case, float]:
    """The mean over several runs of the cases that all have."""
    return {
        case: fmean(values[case] for values in maps)
        for case in maps[0]
        if all(case in values for values in maps)
    }


def order_spread(maps: Sequence[Mapping[Case, float]]) -> dict[str, float]:
    """How scores differ between orders of one stream, in points.

    ``sd``, ``least`` and ``most`` are of the means; ``flipped`` is the share of cases on which two
    orders disagree, a mean over pairs of orders.

    >>> order_spread([{("a", "", "", 0): 1.0}, {("a", "", "", 0): 0.0}])["flipped"]
    100.0
    """
    means = [100 * fmean(values.values()) for values in maps]
    flips = [
        fmean(float(first[case] != second[case]) for case in first)
        for first, second in combinations(maps, 2)
    ]
    return {
        "sd": stdev(means),
        "least": min(means),
        "most": max(means),
        "flipped": 100 * fmean(flips),
    }


def values_of(
    side: Side, panel: str, read: Callable[[Cell], Mapping[str, Any]]
) -> dict[Case, float]:
    """The values of one side in one panel; ``read`` gives a finished run."""
    kind, group, usual = PANELS[panel]
    kind, score = side.kind or kind, side.score or usual
    maps = []
    for cell in side.cells:
        stages = ["final"] if cell.mode == "sequential" else ["immediate"]
        stages = [side.stage] if side.stage else stages
        maps.append(
            {
                (case["fact"], case["kind"], case["group"], case["number"]): case["scores"][score]
                for case in read(cell)["cases"]
                if case["stage"] in stages
                and case["kind"] == kind
                and group in (None, case["group"])
                and case["scores"].get(score) is not None
            }
        )
    return maps[0] if len(maps) == 1 else mean_of(maps)


def measured(pair: Pair, read: Callable[[Cell], Mapping[str, Any]]) -> dict[str, Moved]:
    """What the choice of a pair moves, by panel."""
    found = {}
    for panel in pair.panels:
        first, second = (values_of(side, panel, read) for side in (pair.first, pair.second))
        if pair.first.kind or pair.second.kind:
            first, second = by_fact(first), by_fact(second)
        result = moved(first, second)
        if result is not None:
            found[panel] = result
    return found


# ---- the choices

#: Scores of answers, against a free answer that must be the wanted one and stop.
SCORINGS = {
    "teacher-forced, not free": "forced",
    "share of tokens, not free": "token_share",
    "cut at the answer's length, not whole": "cut",
    "answer contained, not equal": "contained",
    "likelier than the old, not free": "likelier",
}
#: Scores of neighbours, against the share still right of those that were.
LOCALITIES = {
    "text unchanged, not still right": "same_text",
    "arg-max unchanged, not still right": "same_top1",
    "likelier than the new, not still right": "likelier",
}
#: Methods that write the facts of a batch one after another, or each by itself.
ONE_AT_A_TIME = ("ROME", "RROME", "WISE", "GRACE")
#: Methods whose sequences are run, in several orders.
ORDERED = ("FTM", "ROME", "MEMIT", "AlphaEdit")
ORDER = "order of the file, not another"


class Sizes(NamedTuple):
    """Facts of the usual run of a method, of one with one change, at another layer, in a sequence.

    ``orders`` is the number of orders of the sequence.
    """

    usual: int
    changed: int
    layer: int
    stream: int
    orders: int = 5


class Choices:
    """All pairs, by choice.

    Args:
        methods: Methods, with settings as in ``scores.py``.
        names: The methods that write answers of several tokens, each with its settings for that.
        sizes: Numbers of facts.
        layers: For methods the settings of other layers, by label.
    """

    def __init__(
        self,
        methods: Sequence[str],
        names: Mapping[str, str],
        sizes: Sizes,
        layers: Mapping[str, Mapping[str, str]],
    ) -> None:
        self.sizes = sizes
        self.pairs: dict[str, list[Pair]] = {}
        plain = {(method, "words"): Cell(method, sizes.usual) for method in methods}
        for method, settings in names.items():
            plain[method, "names"] = Cell(settings, sizes.changed, "names")
        # Answers of one word differ little by how they are scored, so methods are taken together.
        known = tuple(plain[method, "words"] for method in methods)
        every = methods[0] if len(methods) == 1 else f"{len(methods)} methods"
        self._scorings(f"{every}, words", known)
        for method in names:
            self._scorings(f"{method}, names", (plain[method, "names"],))
        for locality, score in LOCALITIES.items():
            self._add(locality, every, Side(known), Side(known, score), ("neighbours",))
        for (method, answers), cell in plain.items():
            ended = replace(cell, eos=True, facts=sizes.changed)
            self._add("end-of-text token trained", f"{method}, {answers}", cell, ended)
        for method in methods:
            cell = plain[method, "words"]
            self._together(method, cell)
            for label, other in layers.get(method, {}).items():
                self._add("layer", f"{method}, {label}", cell, Cell(other, sizes.layer))
            if method in ("ROME", "MEMIT"):
                label = "no texts before the prompt while editing"
                self._change(label, method, cell, f"{method}:contexts=0")
            if method == "FTM" and "FTM" in names:
                changed, label = (
                    plain[method, "names"],
                    "all answer tokens from the last of the prompt",
                )
                settings = f"{changed.method}:objective=prompt_last"
                self._change(label, "FTM, names", changed, settings)

    def _add(
        self,
        choice: str,
        label: str,
        first: Cell | Side,
        second: Cell | Side,
        panels: Sequence[str] = tuple(PANELS),
    ) -> None:
        sides = [Side((side,)) if isinstance(side, Cell) else side for side in (first, second)]
        self.pairs.setdefault(choice, []).append(Pair(choice, label, *sides, tuple(panels)))

    def _change(self, choice: str, label: str, cell: Cell, settings: str) -> None:
        changed = replace(cell, method=settings, facts=self.sizes.changed)
        self._add(choice, label, cell, changed)

    def _scorings(self, label: str, cells: tuple[Cell, ...]) -> None:
        for scoring, score in SCORINGS.items():
            self._add(scoring, label, Side(cells), Side(cells, score), ("rewrite", "rephrase"))
        own, other = Side(cells, kind="rewrite"), Side(cells, kind="rephrase")
        self._add("asked in the words of the edit", label, other, own, ("rewrite",))

    def _together(self, method: str, cell: Cell) -> None:
        """Facts that hold together: in a batch, in a sequence, in several orders."""
        if method not in ONE_AT_A_TIME:
            size = self.sizes.changed
            batch = replace(cell, mode="batch", chunk=size, facts=size)
            self._add("in one batch, not each alone", method, cell, batch)
        if method not in ORDERED:
            return
        short = replace(cell, facts=self.sizes.stream)
        orders = [
            replace(short, mode="sequential", order=order) for order in range(self.sizes.orders)
        ]
        self._add("in a sequence, not each alone", method, cell, orders[0])
        if method not in ONE_AT_A_TIME:
            batch = replace(short, mode="batch", chunk=self.sizes.stream)
            self._add("in a sequence, not in one batch", method, batch, orders[0])
        for locality, score in LOCALITIES.items():
            after = Side((orders[0],), score)
            self._add(locality, f"{method}, after a sequence", orders[0], after, ("neighbours",))
        immediate = Side((orders[0],), stage="immediate")
        self._add("scored after each edit, not at the end", method, orders[0], immediate)
        self._add(ORDER, method, Side(tuple(orders[1:])), orders[0])
