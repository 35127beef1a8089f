"""What editors do to facts about pictures: a table of scores with 95 % intervals.

    kedit fit -c methods/mend -c data/shapes -c tools/shapes/fit_mend.yaml
    kedit fit -c methods/serac -c data/shapes -c tools/shapes/fit_serac.yaml
    python benchmarks/pictures.py --mend LAST.ckpt --serac LAST.ckpt
    python benchmarks/pictures.py --search --limit 60      which settings, on the validation split

Each record of ``Shapes``' test split is edited alone on the packaged model ``shapes`` and rolled
back.  Reliability and generality are the shares of answers whose tokens are all arg-max, of the
question itself, of another wording of it, and of the same question about another drawing of the
same; locality the share of arg-max tokens along the base model's own answers that are unchanged, of
questions about words, about another picture, about one that differs in a single point, and of
another question about the picture itself.  ``no edit`` trains nothing.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from kedit_lightning import BaseModel, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import Shapes
from kedit_lightning.methods import FTM, GRACE, IKE, MEND, SERAC, LoRA
from kedit_lightning.methods.method import EditMethod

#: Name of a column, and the score it shows.
COLUMNS = {
    "reliability": "rewrite/tf_all",
    "text generality": "rephrase/text/tf_all",
    "image generality": "rephrase/image/tf_all",
    "text locality": "locality/text/keep_top1",
    "image locality": "locality/image/keep_top1",
    "near picture": "locality/near/keep_top1",
    "same picture": "locality/same/keep_top1",
}
Scores = Mapping[str, tuple[float, float, float]]


#: Settings by method: those of the table, and others that the validation split decides between.
TABLE: dict[str, dict[str, Any]] = {
    "FTM": {"lr": 5e-3},
    "LoRA": {"lr": 2e-3},
    "MEND": {},
    "SERAC": {},
    "IKE": {"demonstrations": 0, "picture_similarity": 0.9},
    "GRACE": {"layer": 1},
}
OTHERS: dict[str, list[dict[str, Any]]] = {
    "FTM": [{}, {"lr": 2e-3}, {"lr": 1e-2}],
    "LoRA": [{}, {"lr": 1e-2}],
    "IKE": [{"demonstrations": 0, "picture_similarity": s} for s in (0.8, 0.95)],
    "GRACE": [{}, {"layer": 2}, {"layer": 3}],
}
CLASSES: dict[str, type[EditMethod]] = {
    method.__name__: method for method in (FTM, LoRA, MEND, SERAC, IKE, GRACE)
}


def editors(base: BaseModel, fitted: dict[str, str | None], search: bool) -> Iterator[EditMethod]:
    """The editors with the settings of the table, or with these and others."""
    for name, settings in TABLE.items():
        if name in fitted:
            if fitted[name] is None:
                continue
            settings = {**settings, "checkpoint": fitted[name]}
        for one in [settings, *(OTHERS.get(name, []) if search else [])]:
            yield CLASSES[name](base, **one)


def scored(method: EditMethod, limit: int, search: bool) -> Scores:
    """Scores of facts edited one at a time, with their intervals."""
    trainer = EditTrainer(
        protocol=Protocol(mode="single", generate=False),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run = trainer.validate if search else trainer.test
    run(method, Shapes(limit=limit), verbose=False)
    rows = {row.key: (row.mean, row.low, row.high) for row in method.summary}
    return {column: rows[key] for column, key in COLUMNS.items()}


def line(name: str, scores: Scores) -> str:
    """A row of the table."""
    cells = (f"{mean:.2f} ({low:.2f}-{high:.2f})" for mean, low, high in scores.values())
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mend", help="a checkpoint of a fit; without one MEND has no row")
    parser.add_argument("--serac", help="the same for SERAC")
    parser.add_argument(
        "--search",
        action="store_true",
        help="settings of the table beside others, on the validation split",
    )
    parser.add_argument("--only", nargs="*", help="names of the methods with a row; all of them")
    parser.add_argument("--limit", type=int, default=100, help="records of the test split")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    base = BaseModel.load("shapes")
    print(f"| method | {' | '.join(COLUMNS)} | seconds |")
    print(f"|---|{'---|' * (len(COLUMNS) + 1)}")
    methods: list[tuple[str, Any]] = [("no edit", FTM(base, lr=1e-30, steps=1))]
    fitted = {"MEND": options.mend, "SERAC": options.serac}
    methods += [(type(m).__name__, m) for m in editors(base, fitted, options.search)]
    for name, method in methods:
        if options.only and name not in options.only:
            continue
        start = time.process_time()
        scores = scored(method, options.limit, options.search)
        spent = (time.process_time() - start) / options.limit
        tried = f" {method.settings}" if options.search else ""
        print(f"{line(name, scores)} {spent:.2f} |{tried}", flush=True)


if __name__ == "__main__":
    main()
