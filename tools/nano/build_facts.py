"""Compile the facts and the benchmark records that the package ships for ``nano``.

Usage: ``python tools/nano/build_facts.py --sources ../shared/data``

Reads bare (subject, relation, object) triples from three public collections, gives them our own
relation names, merges relations that several collections repeat, and fixes the list with a seed.
No model takes part, so the list cannot have been filtered by what a model happens to answer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from records import build_records
from sources import Candidates, read_candidates

SEED = 20
SUBJECTS = 1416
MULTI_SUBJECTS = 870
POLAR_SUBJECTS = 36
CHAIN_SUBJECTS = 150
RELATION_CAP = 180
OBJECT_SHARE = 0.2
OBJECT_LIMIT = 0.23
# Relations whose objects are cities and countries, about which one-hop probes can ask on.
LINKED = {
    "birth_city",
    "citizenship",
    "country_of_origin",
    "headquarters_city",
    "founding_city",
    "death_city",
    "work_city",
}
LINK_BONUS = 35
MIN_RELATION = 15
DEFAULT_OUTPUT = Path(__file__).parents[2] / "src/kedit_lightning/data/nano_facts"

Fact = tuple[str, str, str]


@dataclass
class Selection:
    """The growing list of facts, with the counts that keep it balanced."""

    available: Counter[str]
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    relations: Counter[str] = field(default_factory=Counter)
    objects: Counter[tuple[str, str]] = field(default_factory=Counter)

    def open_facts(self, facts: dict[str, str]) -> dict[str, str]:
        """The facts of a subject whose relation and object still have room."""
        return {r: o for r, o in facts.items() if self._has_room(r, o)}

    def _has_room(self, relation: str, obj: str) -> bool:
        size = min(self.available[relation], RELATION_CAP)
        share = max(1, int(OBJECT_SHARE * size))
        return self.relations[relation] < size and self.objects[relation, obj] < share

    def add(self, subject: str, facts: dict[str, str]) -> None:
        """Take a subject with these facts."""
        self.facts[subject] = facts
        for relation, obj in facts.items():
            self.relations[relation] += 1
            self.objects[relation, obj] += 1


def select(candidates: Candidates, rng: random.Random) -> dict[str, dict[str, str]]:
    """Choose subjects: ends of chains first, then subjects with several relations, then others.

    Args:
        candidates: subject -> relation -> object.
        rng: the seeded source of every choice.

    Returns:
        The chosen part of ``candidates``.
    """
    frequency = Counter((r, o) for facts in candidates.values() for r, o in facts.items())
    objects = Counter(o for facts in candidates.values() for o in facts.values())
    order = sorted(candidates)
    rng.shuffle(order)
    selection = Selection(Counter(r for facts in candidates.values() for r in facts))

    def shared(facts: dict[str, str]) -> dict[str, str]:
        # An object that no other subject shares gives no neighbour and no plausible new target.
        return {r: o for r, o in facts.items() if frequency[r, o] >= 3}

    chain = sorted((s for s in order if objects[s] >= 3), key=lambda s: -objects[s])
    for subject in chain[:CHAIN_SUBJECTS]:
        selection.add(subject, selection.open_facts(candidates[subject]))
    # Few subjects with two facts lie in Antarctica; without it the other continents would each
    # hold more than a quarter of the relation.
    polar = [s for s in order if candidates[s].get("continent") == "Antarctica"]
    for subject in polar[:POLAR_SUBJECTS]:
        selection.add(subject, selection.open_facts(candidates[subject]))
    for wanted in (3, 2):
        for subject in order:
            if sum(len(f) > 1 for f in selection.facts.values()) >= MULTI_SUBJECTS:
                break
            facts = selection.open_facts(candidates[subject])
            if subject not in selection.facts and len(facts) >= wanted:
                selection.add(subject, facts)
    _add_singles(selection, candidates, shared, [s for s in order if s not in selection.facts])
    return {s: f for s, f in selection.facts.items() if f}


def _add_singles(
    selection: Selection,
    candidates: Candidates,
    shared: Callable[[dict[str, str]], dict[str, str]],
    order: list[str],
) -> None:
    """Fill up with subjects of one fact, first where an object weighs most in its relation."""
    pools: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for subject in order:
        for relation, obj in sorted(shared(candidates[subject]).items()):
            pools[relation].append((subject, obj))

    def share(relation: str) -> float:
        top = max((n for (r, _), n in selection.objects.items() if r == relation), default=1)
        return top / max(1, selection.relations[relation])

    while len(selection.facts) < SUBJECTS and pools:
        heavy = max((share(r), r) for r in pools)
        small = min((selection.relations[r] - LINK_BONUS * (r in LINKED), r) for r in pools)
        relation = heavy[1] if heavy[0] > OBJECT_LIMIT else small[1]
        room = [
            (s, o)
            for s, o in pools[relation]
            if s not in selection.facts
            and selection.objects[relation, o] < OBJECT_SHARE * selection.relations[relation] + 2
            and selection.open_facts({relation: o})
        ]
        if not room:
            del pools[relation]
            continue
        # Another subject for an object that already has one makes a neighbour.
        subject, obj = max(room[:60], key=lambda pair: selection.objects[relation, pair[1]])
        selection.add(subject, {relation: obj})


def enforce_balance(chosen: dict[str, dict[str, str]], rng: random.Random) -> None:
    """Drop facts until no relation is tiny and no object exceeds a quarter of its relation."""
    while True:
        by_relation: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for subject in sorted(chosen):
            for relation, obj in chosen[subject].items():
                by_relation[relation].append((subject, obj))
        drop: list[tuple[str, str]] = []
        for relation, pairs in sorted(by_relation.items()):
            if len(pairs) < MIN_RELATION:
                drop += [(subject, relation) for subject, _ in pairs]
                continue
            obj, count = Counter(o for _, o in pairs).most_common(1)[0]
            if count > len(pairs) / 4:
                owners = [s for s, o in pairs if o == obj]
                # A subject with other facts loses least.
                rng.shuffle(owners)
                owners.sort(key=lambda s: -len(chosen[s]))
                drop.append((owners[0], relation))
        if not drop:
            return
        for subject, relation in drop:
            del chosen[subject][relation]
            if not chosen[subject]:
                del chosen[subject]


def check_templates(templates: dict[str, dict[str, list[str]]]) -> None:
    """Refuse templates that would leak a held-out wording into training."""
    seen: set[str] = set()
    for relation, entry in templates.items():
        if len(entry["train"]) < 6 or len(entry["held_out"]) != 2:
            raise ValueError(f"{relation}: needs six training templates and two held out")
        for template in entry["train"] + entry["held_out"]:
            if template.count("{}") != 1 or template in seen or re.search(r"\s{2}|\s$", template):
                raise ValueError(f"{relation}: bad or repeated template {template!r}")
            seen.add(template)


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    """Write one JSON object a line."""
    with path.open("w", encoding="utf-8") as handle:
        for row in rows:
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    """Compile, check and write everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    rng = random.Random(SEED)
    templates = json.loads((args.output / "templates.json").read_text(encoding="utf-8"))
    check_templates(templates)
    chosen = select(read_candidates(args.sources), rng)
    enforce_balance(chosen, rng)
    facts: list[Fact] = [(s, r, o) for s in sorted(chosen) for r, o in sorted(chosen[s].items())]
    splits = build_records(chosen, templates, rng)
    rows: list[dict[str, object]] = [
        {"subject": s, "relation": r, "object": o} for s, r, o in facts
    ]
    write_lines(args.output / "facts.jsonl", rows)
    for name, records in splits.items():
        write_lines(args.output / f"{name}.jsonl", records)
    multi = sum(len(f) > 1 for f in chosen.values())
    print(f"{len(facts)} facts, {len(chosen)} subjects ({multi} with several relations)")
    for relation, count in Counter(r for _, r, _ in facts).most_common():
        top = Counter(o for _, r, o in facts if r == relation)
        print(f"  {relation:20s} {count:4d} objects {len(top):3d} top {top.most_common(1)[0]}")
    for name, records in splits.items():
        parts = {
            k: sum(bool(x[k]) for x in records)
            for k in ("neighborhood_prompts", "other_relation", "one_hop")
        }
        print(f"  {name}: {len(records)} {parts}")


if __name__ == "__main__":
    main()
