"""Prepare what ``facts-30m`` is trained and measured on: facts, records, tokenizer and text.

Usage: ``python tools/facts_30m/prepare.py --sources ../shared/data --output prepared/``

The facts are those that ``tools/nano/sources.py`` reads of the public collections, one answer for
each subject and relation, under the relations and wordings of ``nano``. No model takes part.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "nano"))

from build_facts import check_templates, write_lines
from fact_book import FactBook, plain_sentences
from records import build_records
from sources import Candidates, read_candidates
from vocabulary import train_tokenizer

TEMPLATES = Path(__file__).parents[2] / "src/kedit_lightning/data/nano_facts/templates.json"
SEED = 30
ENTRIES, POSITIONS = 8192, 256
#: Largest share of a relation's facts with one answer.
OBJECT_SHARE = 0.25
#: Records of the test, the validation and the training split.
TEST, VALIDATION, TRAIN = 2500, 500, 3000
#: Facts that are kept unless another number is asked for; more of them need a GPU.
FACTS = 8500
#: Plain sentences that the model never reads, for its perplexity.
APART = 400


def object_limit(counts: Counter[str], share: float) -> int:
    """How many facts an answer may have so that none exceeds a share of those that are left.

    >>> object_limit(Counter(a=90, b=20, c=20, d=20, e=20), 0.25)
    26
    """
    limit = max(counts.values())
    while limit > 1 and limit > share * sum(min(n, limit) for n in counts.values()):
        limit -= 1
    return limit


def balanced(candidates: Candidates, rng: random.Random, share: float = OBJECT_SHARE) -> Candidates:
    """The facts that are left when no answer has more than a share of its relation.

    Subjects with several facts keep theirs first.

    Args:
        candidates: subject -> relation -> object.
        rng: the seeded source of every choice.
        share: largest share of an answer.
    """
    owners: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    order = sorted(candidates)
    rng.shuffle(order)
    for subject in sorted(order, key=lambda s: -len(candidates[s])):
        for relation, obj in candidates[subject].items():
            owners[relation][obj].append(subject)
    kept: Candidates = defaultdict(dict)
    for relation, by_object in sorted(owners.items()):
        limit = object_limit(Counter({o: len(s) for o, s in by_object.items()}), share)
        for obj, subjects in sorted(by_object.items()):
            for subject in subjects[:limit]:
                kept[subject][relation] = obj
    return dict(kept)


def some_subjects(facts: Candidates, count: int, rng: random.Random) -> Candidates:
    """Subjects drawn at random, each with all its facts, until there are enough facts.

    Args:
        facts: subject -> relation -> object.
        count: how many facts to keep, at least.
        rng: the seeded source of the draw.
    """
    order = sorted(facts)
    rng.shuffle(order)
    kept: Candidates = {}
    while order and sum(map(len, kept.values())) < count:
        subject = order.pop()
        kept[subject] = facts[subject]
    return kept


def main() -> None:
    """Write facts, records, tokenizer and text, and say how many there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sources", type=Path, required=True, help="folder of the collections")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=FACTS, help="about how many facts to keep")
    options = parser.parse_args()
    folder, rng = options.output, random.Random(SEED)
    folder.mkdir(parents=True, exist_ok=True)
    templates = json.loads(TEMPLATES.read_text(encoding="utf-8"))
    check_templates(templates)
    chosen = balanced(read_candidates(options.sources), rng)
    chosen = some_subjects(chosen, options.facts, rng)
    facts = [(s, r, o) for s in sorted(chosen) for r, o in sorted(chosen[s].items())]
    write_lines(
        folder / "facts.jsonl", [{"subject": s, "relation": r, "object": o} for s, r, o in facts]
    )
    (folder / "templates.json").write_text(TEMPLATES.read_text(encoding="utf-8"), encoding="utf-8")
    splits = build_records(chosen, templates, rng, (TEST, VALIDATION))
    splits["train"] = sorted(rng.sample(splits["train"], TRAIN), key=lambda r: str(r["case_id"]))
    for name, records in splits.items():
        write_lines(folder / f"{name}.jsonl", records)
    texts = options.sources / "wikitext-2"
    more = plain_sentences(texts / "test.txt")
    sentences, apart = plain_sentences(texts / "valid.txt") + more[APART:], more[:APART]
    for name, lines in (("text.txt", sentences), ("text_held_out.txt", apart)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    book = FactBook.read(folder)
    tokenizer = train_tokenizer([*book.sentences(), *sentences], ENTRIES, POSITIONS)
    tokenizer.save_pretrained(folder)
    print(f"{len(facts)} facts, {len(chosen)} subjects, {len(sentences)} sentences")
    for relation, count in Counter(r for _, r, _ in facts).most_common():
        top = Counter(o for _, r, o in facts if r == relation)
        print(f"  {relation:20s} {count:4d} objects {len(top):3d} top {top.most_common(1)[0]}")
    for name, records in splits.items():
        probes = ("neighborhood_prompts", "other_relation", "one_hop")
        print(f"  {name}: {len(records)}", {k: sum(bool(r[k]) for r in records) for k in probes})


if __name__ == "__main__":
    main()
