"""Fits of the tests: a quiet trainer, checkpoints of every step, and fits by several processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from episode_support import data
from places import TESTS


def state(method):
    return {name: tensor.clone() for name, tensor in method.state_dict().items()}


def fit(method, tmp_path, ckpt_path=None, max_epochs=1, source=None, **options):
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(method, source or data(tmp_path), ckpt_path=ckpt_path)
    return trainer


class SaveEachStep(pl.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


RANK_SCRIPT = """
import json, sys
from importlib import import_module
from pathlib import Path
import lightning.pytorch as pl, torch
sys.path.insert(0, {tests!r})
from support import tiny_base
from kedit_lightning import methods

torch.set_num_threads(1)
asked, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
ranks = asked["ranks"]
method = getattr(methods, asked["name"])(tiny_base("gpt2"), **asked["settings"])
trainer = pl.Trainer(
    max_epochs=asked["epochs"], accelerator="cpu", devices=ranks,
    strategy="ddp" if ranks > 1 else "auto", logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
)
trainer.fit(method, import_module(asked["source"]).data(folder, **asked["data"]))
torch.save(method.state_dict(), folder / f"{{ranks}}-{{trainer.global_rank}}.pt")
"""


def fitted_by_ranks(
    folder: Path,
    name: str,
    settings_of: Callable[[int], dict[str, Any]],
    epochs: int = 2,
    source: str = "episode_support",
    **data_settings: Any,
) -> list[dict[str, torch.Tensor]]:
    """What one process learns on all the data, and what each of two learns on its share.

    Args:
        folder: Where data and states are written.
        name: Name of the method.
        settings_of: Settings by the number of processes.
        epochs: Passes over the data.
        source: Support module whose ``data`` writes the records.
        **data_settings: Settings of ``data``.
    """
    script = folder / "script.py"
    script.write_text(RANK_SCRIPT.format(tests=str(TESTS)))
    for ranks in (1, 2):
        asked = {
            "name": name,
            "settings": settings_of(ranks),
            "ranks": ranks,
            "epochs": epochs,
            "source": source,
            "data": data_settings,
        }
        command = [sys.executable, str(script), json.dumps(asked), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
        assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]
