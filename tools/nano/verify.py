"""Print what share of all listed facts a trained folder completes greedily.

Usage: ``python tools/nano/verify.py --model src/kedit_lightning/base_models/nano``
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from completion import completed, fact_pairs
from fact_book import FactBook
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PACKAGE = Path(__file__).parents[2] / "src/kedit_lightning"


def main() -> None:
    """One line a template kind, then the relations with the lowest held-out share."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=PACKAGE / "base_models/nano")
    parser.add_argument("--facts", type=Path, default=PACKAGE / "data/nano_facts")
    args = parser.parse_args()
    book = FactBook.read(args.facts)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    shares: dict[str, list[float]] = defaultdict(list)
    by_relation: dict[str, list[bool]] = defaultdict(list)
    most = max(len(entry["train"]) for entry in book.templates.values())
    for kind, count in (("train", most), ("held_out", 2)):
        for index in range(count):
            facts = [f for f in book.facts if index < len(book.templates[f.relation][kind])]
            right = completed(model, tokenizer, fact_pairs(facts, book, kind, index))
            shares[kind].append(sum(right) / len(right))
            if kind == "held_out":
                for fact, hit in zip(facts, right, strict=True):
                    by_relation[fact.relation].append(hit)
    print(f"{len(book.facts)} facts")
    print(f"canonical template: {shares['train'][0]:.4f}")
    for kind, values in shares.items():
        print(
            f"{kind}: "
            + " ".join(f"{v:.4f}" for v in values)
            + f"  mean {sum(values) / len(values):.4f}"
        )
    for relation, hits in sorted(by_relation.items(), key=lambda kv: sum(kv[1]) / len(kv[1])):
        print(f"  held out, {relation}: {sum(hits) / len(hits):.3f} of {len(hits)}")


if __name__ == "__main__":
    main()
