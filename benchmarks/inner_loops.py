r"""Processor time of edits that are trained together, against those of an earlier version.

    git worktree add ../before COMMIT
    python benchmarks/inner_loops.py --against ../before

Both versions compute the edits of the same facts of NanoFacts on `nano`, as a run under the
protocol `single` asks for them, with the default settings, each in a process of its own.  The
earlier version is the one in the other folder.  The edits of both are compared: the smallest cosine
of what was trained, by fact.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

METHODS = ("FTM", "GRACE")
REPEATS = 3


def measure(method: str, facts: int, output: str) -> None:
    """Time one method in this process, and keep what it trained."""
    import torch
    from safetensors.torch import save_file

    from kedit_lightning import BaseModel, methods
    from kedit_lightning.data import NanoFacts

    warnings.simplefilter("ignore")
    groups = [example.requests for example in NanoFacts(limit=facts, seed=0).examples("test")]
    base = BaseModel.load("nano")
    editor = getattr(methods, method)(base_model=base)
    list(editor.edit_each(groups[:2]))  # what is done once for each model
    seconds, edits = [], []
    for _ in range(REPEATS):
        start = time.process_time()
        edits = list(editor.edit_each(groups))
        seconds.append(time.process_time() - start)
    trained = {}
    for number, edit in enumerate(edits):
        tensors = dict(sorted(edit.state()[0].items()))
        parts = [t.detach().flatten() for name, t in tensors.items() if name != "keys"]
        trained[str(number)] = torch.cat(parts).contiguous()
    save_file(trained, output)
    print(json.dumps({"seconds": min(seconds) / facts}))


def measured(root: Path, method: str, facts: int, output: Path) -> float:
    """Seconds of processor time a fact, of the version in a folder."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", method]
    paths = [str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, "--facts", str(facts), "--output", str(output)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def main() -> None:
    """Print one line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="folder of the earlier version")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.facts, options.output)
        return
    if options.against is None:
        parser.error("--against: give the folder of the earlier version")

    from safetensors.torch import load_file
    from torch.nn.functional import cosine_similarity

    print("| method | before, s/fact | now, s/fact | times faster | smallest cosine |")
    print("|---|---|---|---|---|")
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            before, now = Path(folder, "before"), Path(folder, "now")
            old = measured(options.against, method, options.facts, before)
            new = measured(Path(__file__).parents[1], method, options.facts, now)
            pairs = [
                (one.double(), other.double())
                for one, other in zip(
                    load_file(before).values(), load_file(now).values(), strict=True
                )
            ]
        cosine = min(float(cosine_similarity(one, other, dim=0)) for one, other in pairs)
        print(f"| {method} | {old:.4f} | {new:.4f} | {old / new:.1f} | {cosine:.7f} |", flush=True)


if __name__ == "__main__":
    main()
