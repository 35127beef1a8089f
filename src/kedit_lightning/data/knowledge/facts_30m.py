"""Benchmark of the base model ``facts-30m``."""

from __future__ import annotations

from pathlib import Path

from kedit_lightning.cache_folder import facts_30m_dir, where_facts_30m_is
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.data.knowledge.nano import NanoFacts
from kedit_lightning.errors import DataFileNotFoundError


class Facts30M(NanoFacts):
    """True facts that the base model ``facts-30m`` knows, each with a false object to write.

    Records and probes are those of ``NanoFacts``, of 2,500 subjects to test, 500 to choose settings
    with and 3,000 to learn from. The files stand beside the model, where ``tools/facts_30m`` has
    made it; nothing needs to be named.

    Args:
        path: File to edit and test instead of the one beside the model.
        limit: Number of records kept of each split, drawn by ``seed``; a smaller limit keeps a
            part of what a larger one keeps. All when absent.
        train_path: File that ``fit`` learns from instead of the one beside the model.
        val_path: File of ``validate`` instead of the one beside the model.
        seed: Fixes which records ``limit`` draws and the order of training; the seed of the run
            when absent.
    """

    def split_path(self, split: Split) -> Path:
        """The file named for a split, or else the one beside the model.

        Raises:
            DataFileNotFoundError: The model has not been made here.
        """
        named = EditDataModule.split_path(self, split)
        path = named or facts_30m_dir() / f"{split}.jsonl"
        if named is None and not path.is_file():
            raise DataFileNotFoundError(
                f"the facts of 'facts-30m' are not on this machine: {where_facts_30m_is()}"
            )
        return path
