r"""Seconds per edit and peak memory of each method, one process a figure.

    python benchmarks/methods.py        all methods on a 100-million-parameter Llama
    python benchmarks/methods.py --methods ROME MEMIT --facts 64 \
        --device cuda --shape llama-2-7b --dtype bfloat16
    python benchmarks/methods.py --methods MALMEN --facts 1000
    python benchmarks/methods.py --against ../before --repeats 3

With ``--against``, the version in another folder takes turns with this one, and medians stand
beside each other.  Seconds are those of the processor, on CUDA those of the clock.

The model has random weights: time and memory do not depend on what it knows.  On the CPU, memory
is the highest resident size while editing minus the size after loading (the high-water mark is
reset in between, which needs Linux); on CUDA, what was allocated at most, weights included.  Every
method runs with its defaults, methods for many facts on 32 of them at once; MEMIT and its relatives
edit five layers.  Key statistics are the identity, which is as large as real ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from itertools import cycle, islice
from pathlib import Path

import yaml
from turns import environment_of

CONFIGS = Path(__file__).parents[1] / "configs" / "methods"
SHAPES = {
    # width, MLP width, blocks, heads, key-value heads, vocabulary
    "tiny": (256, 704, 8, 8, 8, 8192),
    "small": (768, 2048, 12, 12, 12, 8192),
    "llama-1b": (2048, 5632, 22, 32, 4, 32000),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
}


def configured(name: str, setting: str) -> dict[str, object]:
    """A setting as a method's config has it."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return {setting: config["model"]["init_args"][setting]}


FIVE = {"layers": [2, 3, 4, 5, 6], "statistics": "identity"}
ONE = {"statistics": "identity"}
#: Settings of each method, and facts of an edit.
METHODS = {
    "FTL": ({}, 1),
    "FTM": ({}, 1),
    "LocFTBF": ({}, 32),
    "CrispEdit": ({}, 32),
    "LoRA": ({}, 1),
    "AdaLoRA": ({}, 1),
    "DPOEdit": ({}, 1),
    "DINM": ({}, 1),
    "ROME": (ONE, 1),
    "RROME": (ONE, 1),
    "MEMIT": (FIVE, 32),
    "PMET": (FIVE, 32),
    "EMMET": (ONE, 32),
    "AlphaEdit": (FIVE, 32),
    "LyapLock": (FIVE, 32),
    "NSE": (FIVE, 32),
    "AnyEdit": (FIVE, 32),
    "UnKE": ({}, 1),
    "UltraEdit": ({}, 32),
    "KN": ({}, 1),
    "KE": ({}, 1),
    "MEND": ({}, 1),
    "InstructEdit": (configured("instructedit", "tasks"), 1),
    "MALMEN": ({}, 32),
    "RLEdit": ({}, 32),
    "SERAC": ({}, 1),
    "GRACE": ({}, 1),
    "DEFER": ({}, 1),
    "MEMOIR": ({}, 1),
    "WISE": ({}, 1),
    "TPatcher": ({}, 1),
    "CaliNet": ({}, 1),
    "MELO": ({}, 1),
    "IKE": ({}, 1),
}


def resident(field: str) -> float:
    """Resident size of this process in MB: ``VmRSS`` now, ``VmHWM`` at most since a reset."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = [line for line in lines if line.startswith(f"{field}:")]
    return int(found.split()[1]) / 1024


def reset_high_water() -> None:
    """Let ``VmHWM`` start again from the present size (proc_pid_clear_refs, value 5)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def build(shape: str, device: str, dtype: str):  # noqa: ANN201 - torch is imported in the child only
    """A Llama with random weights and the packaged tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kedit_lightning import BaseModel
    from kedit_lightning.base_models.spec import resolve

    hidden, inner, layers, heads, kv, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return BaseModel(model, AutoTokenizer.from_pretrained(resolve("nano")), name=shape)


def measure(
    name: str, shape: str, device: str, dtype: str, facts: int | None, edits: int
) -> dict[str, float | str]:
    """Time and memory of one method, in this process."""
    from end_to_end import use_folders_of_version

    use_folders_of_version()
    import torch

    from kedit_lightning import methods
    from kedit_lightning.data import NanoFacts

    warnings.simplefilter("ignore")
    base = build(shape, device, dtype)
    options, usual = METHODS[name]
    count = facts or usual
    facts_at_hand = [e.requests[0] for e in NanoFacts(seed=0).examples("train")]
    # Facts come again where more are asked for than there are.
    requests = list(islice(cycle(facts_at_hand), 2 + edits * count))
    method = getattr(methods, name)(base_model=base, **options)
    method.configure_model()
    reset_high_water()
    loaded = resident("VmRSS")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    method.edit(requests[:2])  # what is done once: contexts, and what libraries set up
    seconds, size = [], 0.0
    clock = time.perf_counter if device == "cuda" else time.process_time
    for start in range(2, len(requests), count):
        part = requests[start : start + count]
        started = clock()
        if method.can.batch:
            made = [method.edit(part)]
        else:  # facts apart from each other, which a method may compute together
            made = list(method.edit_each([[request] for request in part]))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((clock() - started) / count)
        size = sum(edit.nbytes for edit in made) / count
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resident("VmHWM") - loaded
    )
    return {
        "facts": count,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "peak_mb": peak,
        "edit_kb": size / 1024,
    }


def main() -> None:
    """Run each method in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--facts", type=int, help="facts of an edit, or written apart together")
    parser.add_argument("--edits", type=int, default=3, help="edits timed, one after the other")
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--against", type=Path, help="folder of another version")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs of two versions")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        settings = args.shape, args.device, args.dtype, args.facts, args.edits
        print(json.dumps(measure(args.child, *settings)))
        return
    note = "allocated, weights included" if args.device == "cuda" else "above the loaded model"
    print(
        f"{args.shape}, {args.dtype}, {args.device}; median of {args.edits}; peak memory {note}\n"
    )
    if args.against:
        print("| method | before, s/fact | now | ratio | before, peak MB | now | ratio |")
        print(f"|{'---|' * 7}")
    else:
        print(f"{'method':12} {'facts':>5} {'s/fact':>9} {'peak MB':>9} {'KB/fact':>9}")
    for name in args.methods:
        try:
            print(compared(name, args) if args.against else alone(name, args), flush=True)
        except RuntimeError as error:
            print(f"{name:12} failed: {error}", flush=True)


def alone(name: str, args: argparse.Namespace) -> str:
    """The line of a method."""
    row = child(name, args, Path(__file__).parents[1])
    figures = f"{row['seconds']:9.3f} {row['peak_mb']:9.0f} {row['edit_kb']:9.1f}"
    return f"{name:12} {row['facts']:5} {figures}"


def compared(name: str, args: argparse.Namespace) -> str:
    """The line of a method in both versions, which take turns."""
    roots = args.against, Path(__file__).parents[1]
    rows = [[child(name, args, root) for root in roots] for _ in range(args.repeats)]
    cells = []
    for figure, digits in (("seconds", 4), ("peak_mb", 0)):
        before, now = (statistics.median(pair[n][figure] for pair in rows) for n in (0, 1))
        cells += [f"{before:.{digits}f}", f"{now:.{digits}f}", f"{now / before:.2f}"]
    return f"| {name} | {' | '.join(cells)} |"


def child(name: str, args: argparse.Namespace, root: Path) -> dict[str, float]:
    """What a process of the version in a folder measures.

    Raises:
        RuntimeError: It failed.
    """
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    command += ["--shape", args.shape, "--device", args.device, "--dtype", args.dtype]
    command += ["--edits", str(args.edits)]
    command += ["--facts", str(args.facts)] if args.facts else []
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment_of(root)
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
