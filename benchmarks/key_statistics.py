"""Seconds of one pass that collects key statistics of all layers, against what it is made of.

    python benchmarks/key_statistics.py

Two small models with random weights, in float32.  ``forward`` is the same forward pass without the
vocabulary projection and without collecting; ``a layer at a time`` collects one layer in a full
forward pass and repeats that for each layer, ``stopped`` does the same but ends each pass behind
the layer it collects, as the code of ROME does.  ``error`` is the largest relative deviation of a
moment from one summed in float64 over the same keys.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kedit_lightning import BaseModel
from kedit_lightning.base_models.spec import resolve
from kedit_lightning.base_models.taps import capture
from kedit_lightning.statistics import KeyCollector

BLOCKS, WIDTH, VOCABULARY = 6, 256, 3000
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 8, "n_positions": 512},
    "llama": {
        "hidden_size": WIDTH,
        "intermediate_size": 688,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
    },
}


class Figures(NamedTuple):
    """Median seconds over one text, and the deviation from float64."""

    forward: float
    one_pass: float
    stopped: float
    layer_by_layer: float
    error: float


def build(kind: str, entries: int = VOCABULARY) -> BaseModel:
    """A model with random weights and so many entries, and the tokenizer of ``nano``."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve("nano"))
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vocabulary = max(entries, len(tokenizer))
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **SHAPES[kind], **ids)
    return BaseModel(AutoModelForCausalLM.from_config(config), tokenizer, name=kind)


def sample_texts(count: int, words: int) -> list[str]:
    """Texts of random words, long enough to be cut."""
    generator = torch.Generator().manual_seed(0)
    known = ["the", "a", "city", "river", "of", "in", "is", "was", "born", "house", "king"]
    drawn = torch.randint(len(known), (count, words), generator=generator).tolist()
    return [" ".join(known[i] for i in row) for row in drawn]


def median_seconds(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each function, after a first run of each; they take turns."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            started = time.perf_counter()
            function()
            if repeat:
                seconds.append(time.perf_counter() - started)
    return [sorted(seconds)[len(seconds) // 2] for seconds in times]


def measure(kind: str, repeats: int = 5, texts: int = 8, tokens: int = 256) -> Figures:
    """Time and deviation on one batch of texts."""
    base = build(kind)
    batch = sample_texts(texts, 2 * tokens)
    modules = [block.down for block in base.layout.blocks]
    rows = base.pad([type(row)(row.prompt[:tokens], ()) for row in map(base.encoder.encode, batch)])

    @torch.no_grad()
    def forward() -> None:
        base.model.base_model(**rows.inputs, use_cache=False)

    def collect(names: Sequence[str]) -> KeyCollector:
        collector = KeyCollector(base, names, tokens)
        collector.read(batch)
        return collector

    def stopped() -> None:
        for name in modules:
            collect([name])

    @torch.no_grad()
    def layer_by_layer() -> None:
        for name in modules:
            with capture(base.model, [name]) as seen:
                base.model.base_model(**rows.inputs, use_cache=False)
            keys = seen.inputs[name].flatten(0, 1)
            _ = (keys.T @ keys).double()

    times = median_seconds([forward, lambda: collect(modules), stopped, layer_by_layer], repeats)
    return Figures(*times, deviation(base, collect(modules), rows))


@torch.no_grad()
def deviation(base: BaseModel, collector: KeyCollector, rows: Any) -> float:
    """Largest relative deviation of a moment from float64 sums over the same keys."""
    with capture(base.model, collector.modules) as seen:
        base.forward(rows)
    worst = 0.0
    for name, moment in collector.moments.items():
        keys = seen.inputs[name].flatten(0, 1).double()
        exact = keys.T @ keys / len(keys)
        worst = max(worst, float((moment.mean - exact).norm() / exact.norm()))
    return worst


def main(repeats: int = 5) -> None:
    """Print a table."""
    print(f"{'model':6} {'forward':>8} {'one pass':>9} {'stopped':>8} {'a layer':>8}", end="")
    print(f" {'one/forward':>12} {'stopped/one':>12} {'a layer/one':>12} {'error':>8}")
    for kind in SHAPES:
        found = measure(kind, repeats)
        print(
            f"{kind:6} {found.forward:8.3f} {found.one_pass:9.3f} {found.stopped:8.3f} "
            f"{found.layer_by_layer:8.3f} {found.one_pass / found.forward:12.2f} "
            f"{found.stopped / found.one_pass:12.2f} "
            f"{found.layer_by_layer / found.one_pass:12.2f} {found.error:8.0e}"
        )


if __name__ == "__main__":
    main()
