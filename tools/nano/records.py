"""Split the subjects and write the benchmark's records in ROME's format."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

Chosen = dict[str, dict[str, str]]
Record = dict[str, Any]

TEST, VALIDATION = 520, 120
NEIGHBOURS = 5


def split_subjects(
    chosen: Chosen,
    linked: set[str],
    rng: random.Random,
    sizes: tuple[int, int] = (TEST, VALIDATION),
) -> dict[str, dict[str, str]]:
    """Assign each subject to a split and choose the fact that its record edits.

    Ends of chains stay in train, because probes of other records ask about them. A subject moves
    to test or validation only while every edited fact keeps a train subject with the same object.

    Returns:
        split -> subject -> edited relation, in the order of assignment.
    """
    objects = {o for facts in chosen.values() for o in facts.values()}
    left = Counter((r, o) for facts in chosen.values() for r, o in facts.items())
    needed: set[tuple[str, str]] = set()
    order = [s for s in sorted(chosen) if s not in objects]
    rng.shuffle(order)
    splits: dict[str, dict[str, str]] = {"test": {}, "validation": {}, "train": {}}
    for subject in order:
        name = "test" if len(splits["test"]) < sizes[0] else "validation"
        if len(splits[name]) >= sizes[1] and name == "validation":
            break
        pairs = sorted(chosen[subject].items())
        options = [
            (r, o)
            for r, o in pairs
            if left[r, o] >= 3 or (left[r, o] == 2 and (r, o) not in needed)
        ]
        if not options or any(p in needed and left[p] <= 2 for p in pairs):
            continue
        # A fact whose object is a place or company leaves room for a one-hop probe.
        edited = rng.choice([p for p in options if p[0] in linked] or options)
        needed.add(edited)
        left.subtract(pairs)
        splits[name][subject] = edited[0]
    held = {s for name in ("test", "validation") for s in splits[name]}
    for subject in sorted(set(chosen) - held):
        pairs = sorted(chosen[subject].items())
        shared = [(r, o) for r, o in pairs if left[r, o] >= 2]
        splits["train"][subject] = rng.choice(shared or pairs)[0]
    return splits


def _hops(
    facts: dict[str, str], subject: str, entry: Record, templates: dict[str, Record]
) -> list[Record]:
    if not entry["description"]:
        return []
    description = entry["description"].format(subject)
    hops = []
    for relation, answer in sorted(facts.items()):
        prompt = templates[relation]["train"][0].format(description)
        hops.append({"prompt": prompt[0].upper() + prompt[1:], "answers": [answer]})
    return hops


def build_records(
    chosen: Chosen,
    templates: dict[str, Record],
    rng: random.Random,
    sizes: tuple[int, int] = (TEST, VALIDATION),
) -> dict[str, list[Record]]:
    """One record a subject.

    Args:
        chosen: subject -> relation -> object.
        templates: relation -> ``train``, ``held_out``, ``description``.
        rng: the seeded source of every choice.
        sizes: records of the test and of the validation split.

    Returns:
        split -> records.
    """
    linked_relations = {r for r, entry in templates.items() if entry["description"]}
    splits = split_subjects(chosen, linked_relations, rng, sizes)
    trained = splits["train"]
    sharers: dict[tuple[str, str], list[str]] = defaultdict(list)
    choices: dict[str, set[str]] = defaultdict(set)
    for subject, facts in sorted(chosen.items()):
        for relation, obj in facts.items():
            choices[relation].add(obj)
            if subject in trained:
                sharers[relation, obj].append(subject)
    out: dict[str, list[Record]] = {}
    case_id = 0
    for name in ("train", "validation", "test"):
        out[name] = []
        for subject, relation in splits[name].items():
            entry, old = templates[relation], chosen[subject][relation]
            others = sorted(choices[relation] - {old, subject})
            linked = [o for o in others if o in trained and chosen[o]]
            pool = linked if linked and entry["description"] and rng.random() < 0.85 else others
            new = rng.choice(pool)
            near = [s for s in sharers[relation, old] if s not in (subject, new)]
            near = sorted(rng.sample(near, min(NEIGHBOURS, len(near))))
            prompt = entry["train"][0]
            out[name].append(
                {
                    "case_id": case_id,
                    "requested_rewrite": {
                        "prompt": prompt,
                        "subject": subject,
                        "relation_id": relation,
                        "target_new": {"str": new},
                        "target_true": {"str": old},
                    },
                    "paraphrase_prompts": [t.format(subject) for t in entry["held_out"]],
                    "neighborhood_prompts": [prompt.format(s) for s in near],
                    "attribute_prompts": [],
                    "generation_prompts": [],
                    "other_relation": [
                        {"prompt": templates[r]["train"][0].format(subject), "answer": o}
                        for r, o in sorted(chosen[subject].items())
                        if r != relation
                    ],
                    "one_hop": _hops(
                        chosen[new] if new in trained else {}, subject, entry, templates
                    ),
                }
            )
            case_id += 1
    return out
