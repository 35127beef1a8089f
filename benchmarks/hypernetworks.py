r"""Peak memory of MEND's edit and training step beside a forward and a plain backward pass.

    python benchmarks/hypernetworks.py                 on a 100-million-parameter Llama, CPU
    python benchmarks/hypernetworks.py --facts 32
    python benchmarks/hypernetworks.py --device cuda --shape llama-2-7b --dtype bfloat16

All take the same facts, a row each.  A training step writes each by an edit of its own, asks its
questions, and steps Adam; the fourth one is timed.  Each figure comes from a process of its own,
and weights are included: those of the model, and of MEND's networks where they are needed.  On the
CPU it is the highest resident size while the work is done minus that before the model was built,
the libraries being loaded; on CUDA, what was allocated at most.  The model has random weights and
MEND its defaults: the memory depends on neither.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

from methods import SHAPES, build, reset_high_water, resident

FORWARD, EDIT, BACKWARD, STEP = "forward pass", "MEND edit", "plain backward", "MEND step"


def train(method, examples, device: str) -> float:  # noqa: ANN001 - torch is imported in the child
    """Train for four steps; seconds of the last."""
    import torch

    from kedit_lightning import EditBatch

    optimizer = method.configure_optimizers()
    started = 0.0
    for _ in range(4):
        started = time.perf_counter()
        (gradient,) = method.batch_gradients(EditBatch(examples))
        gradients = gradient.mean_gradients
        for parameter, gradient in zip(method.network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        del gradient, gradients
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(what: str, shape: str, device: str, dtype: str, facts: int) -> dict[str, float]:
    """Peak memory of one kind of work, in this process."""
    import torch

    from kedit_lightning.data import NanoFacts
    from kedit_lightning.methods import MEND
    from kedit_lightning.methods.shared.gradient_factors import answer_loss

    warnings.simplefilter("ignore")
    examples = NanoFacts(seed=0).examples("train")[:facts]
    requests = [e.requests[0] for e in examples]
    before = resident("VmRSS")
    base = build(shape, device, dtype)
    weights = sum(p.nbytes for p in base.model.parameters()) / 2**20
    rows = base.rows([r.prompt for r in requests], [r.target_new for r in requests])
    method = MEND(base, checkpoint="none")
    if what in (EDIT, STEP):
        method.configure_model()
        weights += sum(p.nbytes for p in method.network.parameters()) / 2**20
    reset_high_water()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = 0.0
    if what == EDIT:
        method.edit(requests)
    elif what == STEP:
        seconds = train(method, examples, device)
    elif what == FORWARD:
        with torch.no_grad():
            base.answer_logits(rows)
    else:
        base.model.requires_grad_(True)
        answer_loss(base, rows).sum().backward()
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resident("VmHWM") - before
    )
    tokens = int(rows.attention_mask.sum())
    counts = {"rows": len(requests), "tokens": tokens, "seconds": seconds}
    return {"peak_mb": peak, "weights_mb": weights, **counts}


def measured(what: str, shape: str, device: str, dtype: str, facts: int) -> dict[str, float]:
    """The same in a process of its own."""
    options = ["--shape", shape, "--device", device, "--dtype", dtype, "--facts", str(facts)]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{what} failed: {done.stderr.strip()}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run each kind of work in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=1, help="facts of the edit, a row each")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    given = (args.shape, args.device, args.dtype, args.facts)
    if args.child:
        print(json.dumps(measure(args.child, *given)))
        return
    rows = {what: measured(what, *given) for what in (FORWARD, EDIT, BACKWARD, STEP)}
    forward = rows[FORWARD]
    said = f"{forward['rows']:.0f} rows, {forward['tokens']:.0f} tokens"
    print(f"{args.shape}, {args.dtype}, {args.device}; {said}; peak memory, weights included\n")
    print(f"{'':14} {'weights MB':>10} {'peak MB':>9} {'of forward':>10}")
    for what, row in rows.items():
        ratio = row["peak_mb"] / forward["peak_mb"]
        print(f"{what:14} {row['weights_mb']:10.0f} {row['peak_mb']:9.0f} {ratio:10.2f}")
    print(f"\n{STEP}: {1 / rows[STEP]['seconds']:.2f} steps a second")


if __name__ == "__main__":
    main()
