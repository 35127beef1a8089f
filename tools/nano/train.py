"""Train ``nano``, the packaged base model, from the shipped facts and a plain text file.

Usage: ``python tools/nano/train.py --text ../shared/data/wikitext-2/valid.txt``

The same seed, text and number of steps give the same rows in the same order.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a step several times slower as soon as another process
# wants the cores. Read once, when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import lightning
import numpy as np
import torch
from completion import report
from corpus import DocumentWriter
from fact_book import FactBook, plain_sentences
from packed_rows import PackedRows
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from vocabulary import train_tokenizer

PACKAGE = Path(__file__).parents[2] / "src/kedit_lightning"
VOCABULARY, POSITIONS = 4096, 256
# Share of the learning rate at these steps, straight lines between them; a run of another length
# stretches them. From NEAR_FROM on, questions after a changed fact may be close to it.
SCHEDULE = ((-1, 0.0), (149, 1.0), (1440, 1.0), (2000, 0.41667), (2900, 0.01))
NEAR_FROM, STEPS = 2000, 2900


def build_config() -> LlamaConfig:
    """The architecture: six blocks of width 256, embeddings tied."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


class NanoModule(lightning.LightningModule):
    """Next-token training with the learning rate of ``SCHEDULE``.

    Args:
        model: the decoder.
        steps: length of the whole run.
        lr: learning rate of the constant stretch.
        weight_decay: of AdamW.
        compile_model: fuse operations with ``torch.compile``; needs a C++ compiler.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        steps: int,
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        compile_model: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.steps, self.lr, self.weight_decay = steps, lr, weight_decay
        # A plain function, so that checkpoints keep the parameter names of the model.
        self._forward: Any = [torch.compile(model, dynamic=False) if compile_model else model]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the labelled tokens."""
        loss: Tensor = self._forward[0](**batch, use_cache=False).loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: Lightning's own clipping refuses fused optimizers."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def _rate(self, step: int) -> float:
        steps, rates = zip(*SCHEDULE, strict=True)
        return float(np.interp(step * STEPS / self.steps, steps, rates))

    def configure_optimizers(self) -> Any:
        """AdamW and the schedule, stepped every batch."""
        optimizer = torch.optim.AdamW(
            self.parameters(),
            lr=self.lr,
            betas=(0.9, 0.98),
            weight_decay=self.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def save_folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder with weights in 16 bit."""
    weights = {k: v.detach().to(torch.float16).clone() for k, v in model.state_dict().items()}
    half = LlamaForCausalLM(model.config).half()
    half.load_state_dict(weights)
    half.generation_config.update(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Progress(lightning.Callback):
    """Print loss and completion of a sample of facts; save a snapshot when asked.

    Args:
        book: facts and templates.
        tokenizer: the model's tokenizer.
        every: steps between reports.
        snapshots: folder that receives the present model, or None.
        minutes: time between snapshots.
    """

    def __init__(
        self,
        book: FactBook,
        tokenizer: PreTrainedTokenizerFast,
        every: int = 200,
        snapshots: Path | None = None,
        minutes: float = 8.0,
    ) -> None:
        self.book, self.tokenizer, self.every = book, tokenizer, every
        self.snapshots, self.minutes = snapshots, minutes
        self.sample = random.Random(0).sample(book.facts, min(300, len(book.facts)))
        self.begin = self.saved = time.monotonic()
        self.losses: list[Tensor] = []

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Report every so many steps."""
        if not isinstance(pl_module, NanoModule):
            raise TypeError(f"Progress reports on NanoModule, not on {type(pl_module).__name__}")
        self.losses.append(outputs["loss"].detach())
        step = trainer.global_step
        if step % self.every:
            return
        scores = report(pl_module.model, self.tokenizer, self.book, self.sample)
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        seconds = time.monotonic() - self.begin
        print(
            f"step {step} {seconds:.0f} s loss {loss:.3f} "
            + " ".join(f"{k} {v:.3f}" for k, v in scores.items()),
            flush=True,
        )
        due = time.monotonic() - self.saved > 60 * self.minutes
        if self.snapshots is not None and due and scores["train"] >= 0.5:
            self.saved = time.monotonic()
            save_folder(pl_module.model, self.tokenizer, self.snapshots)


def main() -> None:
    """Tokenizer, rows, training, final folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text file")
    parser.add_argument("--facts", type=Path, default=PACKAGE / "data/nano_facts")
    parser.add_argument("--output", type=Path, default=PACKAGE / "base_models/nano")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="bf16-mixed", help="bf16-mixed or 32-true")
    parser.add_argument("--compile", action="store_true", help="needs a C++ compiler")
    parser.add_argument("--work", type=Path, help="folder for snapshots and checkpoints")
    parser.add_argument("--resume", type=Path, help="checkpoint of a run with the same settings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lightning.seed_everything(args.seed, verbose=False)
    book, sentences = FactBook.read(args.facts), plain_sentences(args.text)
    tokenizer = train_tokenizer([*book.sentences(), *sentences], VOCABULARY, POSITIONS)
    rng = random.Random(args.seed)
    writer = DocumentWriter(book, sentences, tokenizer.backend_tokenizer, rng)
    rows = PackedRows(writer, rng, near_from=NEAR_FROM * args.steps // STEPS)
    model = LlamaForCausalLM(build_config())
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(book.facts)} facts, "
        f"{len(sentences)} sentences",
        flush=True,
    )
    callbacks: list[lightning.Callback] = [
        Progress(book, tokenizer, snapshots=args.work / "snapshot" if args.work else None)
    ]
    if args.work:
        callbacks.append(
            lightning.pytorch.callbacks.ModelCheckpoint(
                args.work, every_n_train_steps=200, save_last=True
            )
        )
    trainer = lightning.Trainer(
        max_steps=args.steps,
        precision=args.precision,
        logger=False,
        enable_checkpointing=args.work is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    module = NanoModule(model, args.steps, compile_model=args.compile)
    begin = time.monotonic()
    if args.resume:
        # The rows are a pure function of the seed: drop those that the run has seen.
        rows.skip = torch.load(args.resume, weights_only=False)["global_step"]
    trainer.fit(module, DataLoader(rows, batch_size=None), ckpt_path=args.resume)
    print(f"trained in {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)
    save_folder(model, tokenizer, args.output)
    print(report(model, tokenizer, book, book.facts), flush=True)


if __name__ == "__main__":
    main()
