"""Check ``facts-30m``: its files, what it knows, both sides of padding, and that edits take.

Usage: ``python tools/facts_30m/verify.py [--sample 3000] [--edits 20]``

Files are held against the manifest beside this script, if there is one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "nano"))

from assemble import COMMITTED, differing
from completion import completed, fact_pairs
from fact_book import FactBook

from kedit_lightning import BaseModel, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.cache_folder import facts_30m_dir
from kedit_lightning.data import Facts30M
from kedit_lightning.methods import FTM, ROME

SCORES = ("rewrite/tf_all", "rephrase/tf_all", "locality/neighborhood/known")


def padding_difference(base: BaseModel, prompts: list[str]) -> float:
    """Largest difference of last logits between rows padded on the left, the right, and alone."""
    rows = [base.tokenizer(prompt).input_ids for prompt in prompts]
    width, last = max(map(len, rows)), []
    for left in (True, False):
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            place = slice(width - len(row), None) if left else slice(len(row))
            ids[at, place], mask[at, place] = torch.tensor(row), 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = base.model(ids, attention_mask=mask, position_ids=positions).logits
        ends = [-1] * len(rows) if left else [len(row) - 1 for row in rows]
        last.append(torch.stack([logits[at, end] for at, end in enumerate(ends)]))
    with torch.no_grad():
        alone = torch.stack([base.model(torch.tensor([row])).logits[0, -1] for row in rows])
    return max(float((one - alone).abs().max()) for one in last)


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="facts that are asked; all if absent")
    parser.add_argument("--edits", type=int, default=20, help="facts that each method writes")
    options = parser.parse_args()
    folder = facts_30m_dir()
    if COMMITTED.is_file():
        wrong = differing(folder, json.loads(COMMITTED.read_text(encoding="utf-8")))
        print("files that are not those of the manifest:", ", ".join(wrong) or "none")
    base = BaseModel.load("facts-30m")
    book = FactBook.read(folder)
    facts = book.facts
    if options.sample:
        facts = random.Random(1).sample(facts, options.sample)
    for kind, index in (("train", 0), ("held_out", 0), ("held_out", 1)):
        right = completed(base.model, base.tokenizer, fact_pairs(facts, book, kind, index))
        share = sum(right) / len(right)
        print(f"{kind} {index + 1}: {share:.4f} of {len(right)} facts", flush=True)
    prompts = [prompt for prompt, _ in fact_pairs(facts[:64], book, "train", 0)]
    print(f"padding: logits differ by {padding_difference(base, prompts):.1e} at most", flush=True)
    data = Facts30M(limit=options.edits, seed=0)
    for kind in (ROME, FTM):
        trainer = EditTrainer(protocol=Protocol(mode="single"), enable_progress_bar=False,
                              enable_model_summary=False, accelerator="cpu")  # fmt: skip
        method = kind(base_model=base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.validate(method, data, verbose=False)
        rows = {row.key: row for row in method.summary}
        shown = (f"{key} {rows[key].mean:.3f} ({rows[key].low:.3f} to {rows[key].high:.3f})"
                 for key in SCORES if key in rows)  # fmt: skip
        print(f"{kind.__name__}, {options.edits} facts:", ", ".join(shown), flush=True)


if __name__ == "__main__":
    main()
