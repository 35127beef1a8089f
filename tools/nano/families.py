"""Train tiny models of other architectures that know some of the facts of ``nano``.

Usage: ``python tools/nano/families.py FOLDER --text ../shared/data/wikitext-2/valid.txt``

They show what rules for settings do on models that no table of published settings lists.  Each has
about 1.5 million parameters and the tokenizer of ``nano``, and takes a few minutes on one core.
Beside the models come the records of their relations, as ``validation.jsonl`` and ``test.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning
import torch
from completion import report
from corpus import DocumentWriter
from fact_book import FactBook, plain_sentences
from packed_rows import PackedRows
from torch.utils.data import DataLoader
from train import PACKAGE, POSITIONS, NanoModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

RELATIONS = (
    "capital",
    "developer",
    "genre",
    "instrument",
    "native_language",
    "office",
    "original_language",
    "religion",
)
#: Architectures by name, of different depths: model type and the settings of its configuration.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {
        "gpt2": ("gpt2", {"n_embd": 128, "n_layer": 5, "n_head": 4, "n_positions": POSITIONS}),
        "llama": (
            "llama",
            {
                "hidden_size": 128,
                "intermediate_size": 344,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": POSITIONS,
                "tie_word_embeddings": True,
            },
        ),
        "gpt_neox": (
            "gpt_neox",
            {
                "hidden_size": 96,
                "intermediate_size": 384,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "max_position_embeddings": POSITIONS,
            },
        ),
    }
)


def build(family: str, vocabulary: int) -> Any:
    """A model with fresh weights."""
    kind, settings = FAMILIES[family]
    config = AutoConfig.for_model(
        kind, vocab_size=vocabulary, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings
    )
    return AutoModelForCausalLM.from_config(config)


def train(
    model: Any, tokenizer: PreTrainedTokenizerFast, book: FactBook, args: argparse.Namespace
) -> None:
    """Train on documents about the facts and on plain text, none of which changes a fact."""
    rng = random.Random(args.seed)
    writer = DocumentWriter(book, plain_sentences(args.text), tokenizer.backend_tokenizer, rng)
    rows = PackedRows(
        writer, rng, short=(32, 64), long_share=0.0, changed_share=0.0, near_from=args.steps
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        precision=args.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(NanoModule(model, args.steps, lr=4e-3), DataLoader(rows, batch_size=None))


def write_records(facts: Path, folder: Path) -> None:
    """The records of the benchmark that are about the relations."""
    for split in ("train", "validation", "test"):
        lines = (facts / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = [
            line
            for line in lines
            if json.loads(line)["requested_rewrite"]["relation_id"] in RELATIONS
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


def main() -> None:
    """Train each family in turn, and say what it knows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="receives a folder for each family")
    parser.add_argument("--text", type=Path, required=True, help="plain text file")
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=[*FAMILIES])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="bf16-mixed", help="bf16-mixed or 32-true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = PACKAGE / "data/nano_facts"
    args.folder.mkdir(parents=True, exist_ok=True)
    write_records(facts, args.folder)
    known = FactBook.read(facts)
    book = FactBook(
        [fact for fact in known.facts if fact.relation in RELATIONS],
        {relation: known.templates[relation] for relation in RELATIONS},
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(PACKAGE / "base_models/nano")
    for family in args.families:
        lightning.seed_everything(args.seed, verbose=False)
        begin, model = time.monotonic(), build(family, len(tokenizer))
        train(model, tokenizer, book, args)
        model.save_pretrained(args.folder / family)
        tokenizer.save_pretrained(args.folder / family)
        scores = report(model, tokenizer, book, book.facts)
        print(
            f"{family}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{len(book.facts)} facts, {time.monotonic() - begin:.0f} s, "
            + " ".join(f"{name} {value:.3f}" for name, value in scores.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
