r"""Processor time of an evaluation, in units of the forward passes that it makes.

    python benchmarks/evaluation.py                     100 facts of NanoFacts on `nano`
    python benchmarks/evaluation.py --chunk-size 20     20 facts a pass, each under its edit

The method does nothing: each fact gets an edit of its own that adds zero.  All probes of the facts
are scored before and after, teacher-forced and by free answers, the base model's answers included
(nothing is read from the cache of an earlier run).  Time inside `model.forward` is what the same
passes cost by themselves; the rest is reading data, tokenising, decoding, scoring and summing up.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from kedit_lightning import BaseModel, EditRequest, EditTrainer
from kedit_lightning.benchmark import Protocol
from kedit_lightning.data import NanoFacts
from kedit_lightning.edits import LowRankEdit
from kedit_lightning.edits.projections import projection_shape
from kedit_lightning.methods import Capabilities, EditMethod


class NoEdit(EditMethod):
    """Adds zero to the output of the first MLP."""

    can = Capabilities(weights=True)

    def compute_edit(self, requests: Sequence[EditRequest]) -> LowRankEdit:
        """An edit without effect."""
        name = self.base.layout.dense_blocks[0].down
        d_in, d_out = projection_shape(self.base.module(name))
        factors = torch.zeros(1, d_in), torch.zeros(d_out, 1)
        return LowRankEdit(self.base, {name: factors}, origin=self.origin(requests))


def measure(facts: int, chunk_size: int) -> tuple[float, float, int]:
    """Processor seconds of the evaluation, of its forward passes, and their number."""
    base = BaseModel.load("nano")
    spent, calls, forward = 0.0, 0, base.model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent, calls
        start = time.process_time()
        try:
            return forward(*args, **kwargs)
        finally:
            spent += time.process_time() - start
            calls += 1

    method, data = NoEdit(base_model=base), NanoFacts(limit=facts, seed=0)
    protocol = Protocol(mode="single", chunk_size=chunk_size)
    trainer = EditTrainer(protocol=protocol, enable_progress_bar=False, usual_callbacks=False)
    base.model.forward = timed
    start = time.process_time()
    trainer.test(method, data, verbose=False)
    return time.process_time() - start, spent, calls


def main() -> None:
    """Print one line of a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--chunk-size", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KEDIT_CACHE"] = folder
        measure(2, 1)  # what is done once in a process
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KEDIT_CACHE"] = folder
        whole, forward, calls = measure(given.facts, given.chunk_size)
    print("| facts | a chunk | forward passes | their seconds | evaluation | ratio |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {given.facts} | {given.chunk_size} | {calls} | {forward:.2f} | {whole:.2f} "
        f"| {whole / forward:.2f} |"
    )


if __name__ == "__main__":
    main()
