"""ROME on a model of the shape of Llama-2-7B: seconds of a fact alone and of many, and memory.

    python benchmarks/gpu_rome.py                        bfloat16 on the first GPU, about a minute
    python benchmarks/gpu_rome.py --device cpu --small   a tiny shape, to try the script

The weights are random and made on the device, the tokenizer is that of ``nano``, and the facts are
those of NanoFacts, each under an edit of its own.  ROME has its default settings for this shape, at
layer 5.  Key statistics come from the packaged texts, and contexts are written once; neither is
counted.  With random weights no fact is found early, so that all steps run.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from kedit_lightning import BaseModel, EditRequest
from kedit_lightning.data import NanoFacts
from kedit_lightning.methods import ROME
from kedit_lightning.statistics import (
    KeyCollector,
    Provenance,
    few_sample_texts,
    write_statistics,
)

LAYER = 5
LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "vocab_size": 5000,
    "max_position_embeddings": 512,
}
STARTED = time.perf_counter()


def say(text: str) -> None:
    """Print a line at once, with the seconds since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


class Device:
    """A device, with its clock and its memory."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.on_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        """Until all that was asked for is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, function: Any) -> float:
        """Wall seconds of a call."""
        self.wait()
        started = time.perf_counter()
        function()
        self.wait()
        return time.perf_counter() - started

    def forget_peak(self) -> None:
        """Start to look for a new peak of memory."""
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Most bytes in use since then; NaN on a CPU."""
        return float(torch.cuda.max_memory_allocated(self.device)) if self.on_gpu else float("nan")


def build(device: torch.device, shape: dict[str, Any]) -> BaseModel:
    """The model, made on the device."""
    tokenizer = BaseModel.load("nano").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)
    with torch.no_grad():  # it writes words that the tokenizer has, and no end
        model.lm_head.weight[len(tokenizer) :] = 0
        model.lm_head.weight[:3] = 0
    return BaseModel(model, tokenizer, name="llama-2-7b-shape")


def collect(base: BaseModel, folder: Path, count: int) -> Path:
    """A file with statistics of the keys of the edited layer, from some packaged texts."""
    down = base.layout.mlp_block(LAYER).down
    collector = KeyCollector(base, [down], 256)
    for start in range(0, count, 16):
        collector.read(few_sample_texts()[start : min(start + 16, count)])
    origin = Provenance.of(base, collector.corpus, "packaged texts", split=True)
    return write_statistics(folder / "keys.safetensors", collector.moments, origin)


def functions(call: Any, count: int) -> str:
    """The functions of the package in which a call spends most time, with what they call."""
    profiler, out = cProfile.Profile(), io.StringIO()
    profiler.runcall(call)
    stats = pstats.Stats(profiler, stream=out)
    stats.sort_stats("cumulative").print_stats("kedit_lightning", count)
    kept = [line for line in out.getvalue().splitlines() if "kedit_lightning" in line]
    return "\n".join(
        line.split("kedit_lightning/")[0][:45] + line[line.rfind("/") :] for line in kept
    )


def kernels(device: Device, call: Any, count: int) -> str:
    """Where a call spends its time on the device, and how long the device had nothing to do."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.on_gpu else [])]
    with profile(activities=kinds) as found:
        seconds = device.seconds(call)
    events = found.key_averages()
    by, name = (
        ("self_device_time_total", "device") if device.on_gpu else ("self_cpu_time_total", "cpu")
    )
    busy = sum(getattr(event, by) for event in events) / 1e6
    launches = sum(event.count for event in events if event.key.startswith("cudaLaunchKernel"))
    lines = [
        f"profiled: {seconds:.3f} s, of which the {name} was busy {busy:.3f} s "
        f"({100 * busy / seconds:.0f} %); {launches} kernel launches"
    ]
    top = sorted(events, key=lambda event: -getattr(event, by))[:count]
    lines += [f"  {getattr(e, by) / 1e3:9.2f} ms {e.count:7d} x  {e.key[:90]}" for e in top]
    return "\n".join(lines)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Run all of it and print as it goes."""
    device = Device(options.device)
    base = build(device.device, SMALL if options.small else LARGE)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    where = torch.cuda.get_device_name(device.device) if device.on_gpu else "CPU"
    say(f"{where}, torch {torch.__version__}; weights of {weights / 1e9:.2f} GB are made")
    statistics = str(collect(base, folder, options.texts))
    say("statistics are collected")
    examples = NanoFacts(limit=options.facts + 3, seed=0).examples("test")
    facts: list[Sequence[EditRequest]] = [example.requests[:1] for example in examples]
    batch, others = facts[: options.facts], facts[options.facts :]
    method = ROME(base_model=base, layer=LAYER, statistics=statistics)
    warm = device.seconds(lambda: method.edit(others[0]))
    say(f"settings: {method.settings}")
    tokens = [len(base.encode(text).prompt) for text in method.context_texts]
    say(
        f"contexts: {len(set(method.context_texts))} different ones, {min(tokens)} to {max(tokens)}"
        f" tokens; the first edit with all that is done once took {warm:.2f} s"
    )
    device.forget_peak()
    alone = [device.seconds(partial(method.edit, others[1 + i % 2])) for i in range(3)]
    say(
        f"one fact alone: {median(alone):.3f} s (target 1); peak {device.peak() / weights:.2f} "
        "times the weights (target 1.5)"
    )
    list(method.edit_each(batch[:2]))
    device.forget_peak()
    edits: list[Any] = []
    together = device.seconds(lambda: edits.extend(method.edit_each(batch)))
    say(
        f"{len(batch)} facts, an edit each: {together / len(batch):.3f} s a fact (target 0.15); "
        f"peak {device.peak() / weights:.2f} times the weights (target 1.5)"
    )
    say("where the time of one fact goes, as Python sees it (calls, own time, with callees):")
    print(functions(lambda: method.edit(others[1]), 25), flush=True)
    few = ROME(base_model=base, layer=LAYER, statistics=statistics, steps=4, contexts=20)
    few.edit(others[0])
    say("one fact with 4 steps:")
    print(kernels(device, lambda: few.edit(others[1]), 15), flush=True)
    count = min(8, len(batch))
    say(f"{count} facts, an edit each, with 4 steps:")
    print(kernels(device, lambda: list(few.edit_each(batch[:count])), 15), flush=True)
    say("done")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny shape")
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--texts", type=int, default=64, help="texts of the key statistics")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
