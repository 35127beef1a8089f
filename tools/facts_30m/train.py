"""Train ``facts-30m``, a GPT-2 of 23 million parameters, on the facts that ``prepare.py`` wrote.

Usage: ``python tools/facts_30m/train.py --prepared prepared/ --output model/ --device cuda``

The learning rate follows the clock: it falls to nothing at the end of ``--minutes``, whatever the
machine. Runs of equal seed and minutes are therefore alike and not equal. With ``--state``, what a
run needs to go on is kept in a folder, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from row_pool import RowPool
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[1] / "nano"))

from completion import completed, fact_pairs
from fact_book import Fact, FactBook

POSITIONS = 256
#: Share of the learning rate at shares of the time, straight lines between them.
SCHEDULE = ((0.0, 1.0), (0.5, 1.0), (1.0, 0.01))
#: Share of the time from which questions after a changed fact may be close to it.
NEAR_FROM = 0.8
WARM_UP = 50
SHARD = "14MB"


def build_model(entries: int, layers: int = 8, width: int = 448) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights, heads of 64 and no dropout."""
    config = GPT2Config(
        vocab_size=entries,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        # GPT-2's own function, in one operation instead of six.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # On rows of 64 tokens a sixth faster on processors than the fused attention.
        attn_implementation="eager",
    )
    return GPT2LMHeadModel(config)


class Run:
    """Model, optimizer and clock of a training run.

    Args:
        model: the decoder, on its device.
        device: ``cuda`` or ``cpu``.
        lr: learning rate of the constant stretch.
        minutes: length of the training.
    """

    def __init__(self, model: GPT2LMHeadModel, device: str, lr: float, minutes: float) -> None:
        self.model, self.device, self.lr, self.minutes = model, device, lr, minutes
        self.steps, self.spent = 0, 0.0
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
        inner = [p for name, p in matrices if name.startswith("transformer.h.")]
        tables = [p for name, p in matrices if not name.startswith("transformer.h.")]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        # Muon learns rare associations in fewer tokens than AdamW, which embeddings still need.
        self.optimizers = [
            torch.optim.Muon(inner, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [
                    {"params": tables, "weight_decay": 0.05},
                    {"params": vectors, "weight_decay": 0.0},
                ],
                lr=lr,
                betas=(0.9, 0.98),
                fused=True,
            ),
        ]

    def clock(self) -> float:
        """Seconds: of the wall on a GPU, of the processor otherwise, for each thread.

        Other work on the machine thus slows a training down and takes nothing from it.
        """
        if self.device == "cuda":
            return time.monotonic()
        return time.process_time() / torch.get_num_threads()

    @property
    def progress(self) -> float:
        """Share of the time that is over."""
        return min(1.0, self.spent / (60 * self.minutes))

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One step on rows of ids. Shapes ``[rows, tokens]``."""
        shares, rates = zip(*SCHEDULE, strict=True)
        rate = self.lr * float(np.interp(self.progress, shares, rates))
        for group in (g for o in self.optimizers for g in o.param_groups):
            group["lr"] = rate * min(1.0, (self.steps + 1) / WARM_UP)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            logits = self.model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        self.model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.steps += 1
        return loss.detach()

    def save_state(self, folder: Path) -> None:
        """Keep what a later run needs to go on."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        for number, optimizer in enumerate(self.optimizers):
            for index, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{k}": v for k, v in entry.items()}
        save_file(tensors, folder / "new.safetensors", {"steps": str(self.steps),
                                                        "spent": str(self.spent)})  # fmt: skip
        (folder / "new.safetensors").replace(folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps({"steps": self.steps, "spent": self.spent}))

    def load_state(self, folder: Path) -> None:
        """Go on from what an earlier run has kept."""
        known = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        self.steps, self.spent = known["steps"], known["spent"]
        tensors = load_file(folder / "state.safetensors", device=self.device)
        states: list[dict[int, dict[str, Any]]] = [{} for _ in self.optimizers]
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for name, value in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "optimizer":
                number, index, entry = rest.split(".")
                states[int(number)].setdefault(int(index), {})[entry] = value
        for optimizer, state in zip(self.optimizers, states, strict=True):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_folder(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write weights in 16 bit, in pieces, and the configuration."""
    half = GPT2LMHeadModel(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder, max_shard_size=SHARD)
    (folder / "generation_config.json").unlink(missing_ok=True)


def known_shares(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerFast,
    book: FactBook,
    facts: list[Fact],
    templates: int = 1,
) -> dict[str, float]:
    """Share of facts whose answer follows greedily, by wording.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        book: the wordings.
        facts: which facts to ask.
        templates: how many of the training wordings to ask with.
    """
    shares = {}
    for kind, count in (("train", templates), ("held_out", 2)):
        for index in range(count):
            asked = [f for f in facts if index < len(book.templates[f.relation][kind])]
            right = completed(model, tokenizer, fact_pairs(asked, book, kind, index), batch=1024)
            shares[f"{kind}_{index + 1}"] = sum(right) / len(right)
    return shares


@torch.no_grad()
def perplexity(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, lines: list[str]
) -> float:
    """Of a token of lines of text, each read alone."""
    total, count = 0.0, 0
    for line in lines:
        ids = tokenizer(line, return_tensors="pt", truncation=True).input_ids.to(model.device)
        scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total -= scores.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return float(np.exp(total / count))


class Reporter:
    """Prints lines and keeps them in ``log.txt`` of a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.txt"

    def __call__(self, **values: Any) -> None:
        """One line of JSON."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v
                           for k, v in values.items()})  # fmt: skip
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def train(run: Run, pool: RowPool, options: argparse.Namespace, tell: Any) -> None:
    """Steps until the time is over, with a report and a snapshot now and then."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.prepared)
    book = FactBook.read(options.prepared)
    sample = random.Random(0).sample(book.facts, min(1000, len(book.facts)))
    pool.fill(near=run.progress >= NEAR_FROM)
    told, losses = run.spent, []
    near, taken, saved = run.progress >= NEAR_FROM, pool.taken, run.spent
    begin = run.clock() - run.spent
    while run.progress < 1:
        if not near and run.progress >= NEAR_FROM:
            near = True
            pool.fill(near=True)
        losses.append(run.step(*pool.take(options.batch_tokens)))
        if run.steps % 10 == 0 and options.device == "cuda":
            torch.cuda.synchronize()  # so that the clock is that of the work that is done
        run.spent = run.clock() - begin
        if run.spent - told > options.report_seconds or run.progress >= 1:
            speed = (pool.taken - taken) / (run.spent - told)
            shares = known_shares(run.model, tokenizer, book, sample)
            loss = torch.stack(losses).mean().item()
            tell(step=run.steps, seconds=round(run.spent), tokens=pool.taken, fresh=pool.written,
                 per_second=round(speed), loss=loss, **shares)  # fmt: skip
            if run.progress > NEAR_FROM and np.isfinite(loss):
                save_folder(run.model, options.output)
            losses, taken = [], pool.taken
            told = run.spent = run.clock() - begin
        if options.state and run.spent - saved > 300:
            run.save_state(options.state)
            saved = run.spent
    if options.state:
        run.save_state(options.state)


def main() -> None:
    """Train, save in 16 bit, and say what the saved model knows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prepared", type=Path, required=True, help="folder of prepare.py")
    parser.add_argument("--output", type=Path, required=True, help="receives weights and log")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=5.0, help="time for the training alone")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=448, help="a multiple of 64")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch-tokens", type=int, help="32768 on CUDA, 4096 on a CPU")
    parser.add_argument("--workers", type=int, help="processes that write rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sample", type=int, help="facts asked at the end; all if absent")
    parser.add_argument("--report-seconds", type=float, default=20.0)
    parser.add_argument("--state", type=Path, help="folder from which an ended run goes on")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.batch_tokens = options.batch_tokens or (32768 if on_gpu else 4096)
    if options.workers is None:
        options.workers = max(1, (os.cpu_count() or 2) - 2) if on_gpu else 0
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    tell = Reporter(options.output)
    # Processes are forked before the device is used.
    sizes = {"least": 4_000_000} if on_gpu else {"capacity": 2_000_000}
    pool = RowPool(options.prepared, options.device, options.seed, options.workers, **sizes)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.prepared)
    model = build_model(len(tokenizer), options.layers, options.width).to(options.device)
    run = Run(model, options.device, options.lr, options.minutes)
    if options.state and (options.state / "state.json").is_file():
        run.load_state(options.state)
        pool.begin_at(run.steps)  # a run has fewer chunks than steps
    book = FactBook.read(options.prepared)
    tell(parameters=sum(p.numel() for p in model.parameters()), facts=len(book.facts),
         torch=torch.__version__, device=torch.cuda.get_device_name() if on_gpu else "cpu",
         minutes=options.minutes, seed=options.seed, lr=options.lr,
         batch_tokens=options.batch_tokens, workers=options.workers)  # fmt: skip
    try:
        train(run, pool, options, tell)
    finally:
        pool.close()
    saved = GPT2LMHeadModel.from_pretrained(options.output, dtype=torch.float32)
    saved = saved.to(options.device).eval()
    apart = (options.prepared / "text_held_out.txt").read_text(encoding="utf-8").splitlines()
    shares = known_shares(saved, tokenizer, book, book.facts[: options.sample], templates=7)
    tell(saved="in 16 bit", perplexity=perplexity(saved, tokenizer, apart), **shares)


if __name__ == "__main__":
    main()
