"""Peak memory and processor time of target optimisation, against those of an earlier version.

    git worktree add ../before COMMIT
    python benchmarks/target_memory.py --against ../before

The values of 32 facts of NanoFacts under 21 contexts, on a GPT-2 of 100 million weights in five
blocks, random and in float32.  Each version runs in a process of its own, by turns, on one thread.
Memory is the high-water mark of the process less what it held before, with the model loaded and
the values of two facts found once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

FACTS, STEPS, LAYER = 32, 2, 1
SHAPE = {"n_embd": 1024, "n_layer": 5, "n_head": 16, "vocab_size": 36_000}


def serve(output: str) -> None:
    """Find the values once, and print seconds and bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    from kedit_lightning import BaseModel
    from kedit_lightning.data import NanoFacts
    from kedit_lightning.methods import ROME

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model, tokenizer = GPT2LMHeadModel(config).eval(), BaseModel.load("nano").tokenizer
    base = BaseModel(model, tokenizer, name="gpt2-of-five")
    method = ROME(base, layer=LAYER, steps=STEPS, stop_loss=0.0, statistics="identity")
    words = ["the", "city", "of", "a", "river", "in", "which", "she", "was", "born", "and", "he"]
    lengths = [5] * 10 + [10] * 10
    vars(method)["context_texts"] = tuple(
        " ".join(words[(i + j) % len(words)] for j in range(length)) + ". "
        for i, length in enumerate(lengths)
    )
    examples = NanoFacts(limit=FACTS, seed=0).examples("test")
    requests = [example.requests[0] for example in examples]

    def values(count: int) -> torch.Tensor:
        with method.computing(requests[:count]):
            return method.layer_values(requests[:count]).values(LAYER)

    values(2)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    started = time.process_time()
    found = values(FACTS)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save_file({"values": found}, output)
    weights = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"seconds": seconds, "bytes": peak - held, "weights": weights}))


def run(root: Path, output: Path) -> dict[str, float]:
    """Seconds and bytes of the version in a folder."""
    paths = [str(root / "src"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", str(output)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print a line for each version, and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="folder of the earlier version")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    import torch
    from safetensors.torch import load_file

    roots = {"now": Path(__file__).parents[1]}
    if options.against:
        roots = {"before": options.against, **roots}
    with tempfile.TemporaryDirectory() as folder:
        found = [
            {name: run(root, Path(folder, name)) for name, root in roots.items()}
            for _ in range(options.repeats)
        ]
        values = {name: load_file(Path(folder, name))["values"] for name in roots}
    print(f"{found[0]['now']['weights'] / 1e6:.0f} million weights, {STEPS} steps")
    for name in roots:
        seconds = statistics.median(one[name]["seconds"] for one in found)
        most = max(one[name]["bytes"] for one in found)
        print(f"{name:6}  {most / 1e9:.2f} GB  {seconds:.1f} s", flush=True)
    if options.against:
        times = statistics.median(one["now"]["seconds"] / one["before"]["seconds"] for one in found)
        size = max(one["now"]["bytes"] / one["before"]["bytes"] for one in found)
        cosine = torch.cosine_similarity(values["before"], values["now"], dim=1).min()
        print(f"ratio   {size:.2f} of the memory, {times:.2f} of the time; cosine {cosine:.7f}")


if __name__ == "__main__":
    main()
