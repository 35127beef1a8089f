"""How ``fit`` collects statistics of keys: one pass over text, for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kedit_lightning.data.text.texts import TextBatch, Texts
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.statistics import KeyCollector, TextPass, save_to_cache


class StatisticsFit(EditMethod):
    """Base of methods whose ``fit`` collects second moments of keys.

    Subclasses take the settings ``fit_length``, ``fit_tokens`` and ``fit_error``.  What was summed
    lives in the cache alone, so no checkpoint holds any of it.
    """

    learns = "second moments of the keys of every layer, from plain text"
    _pass: TextPass | None = None

    def configure_model(self) -> None:
        """Build what the method needs, and a stand-in for the parameters it does not have."""
        super().configure_model()
        if getattr(self, "_stand_in", None) is None and self._trainer is not None:
            # DistributedDataParallel refuses a module that has no parameter at all.
            self._stand_in = torch.nn.Parameter(torch.zeros(0))

    def on_train_start(self) -> None:
        """Start a pass, or continue an interrupted one."""
        modules = [block.down for block in self.base.layout.dense_blocks]
        collector = KeyCollector(self.base, modules, self.hparams["fit_length"])
        loader: Any = self.trainer.train_dataloader
        state = loader.state_dict() if hasattr(loader, "state_dict") else {}
        self._pass = TextPass(collector, state.get("identity", {}), self.trainer.global_rank)
        if self._pass.batches:
            self.print(
                f"continuing a fit that was interrupted after {self._pass.batches} batches "
                f"({collector.tokens} tokens); they are not read again"
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """End the pass once it has read enough."""
        if self.hparams["fit_tokens"] is None and self.hparams["fit_error"] is None:
            return None
        reading = self._reading
        enough = reading.is_new(batch_idx) and self._is_enough(reading.collector)
        # Together, as Lightning's processes wait for each other at every batch.
        return -1 if self.trainer.strategy.reduce_boolean_decision(enough) else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add the keys of a batch of texts."""
        if not isinstance(batch, TextBatch):
            raise UnsupportedUseError(
                f"{type(self).__name__} is fitted on plain text; use --data Texts "
                "--data.path FOLDER"
            )
        self._reading.read(batch_idx, batch.texts)

    def on_train_epoch_end(self) -> None:
        """Keep what was collected; one pass is all there is to do."""
        reading, strategy = self._reading, self.trainer.strategy
        reading.check_complete()

        def total(tensor: Tensor) -> Tensor:
            # On the strategy's device: NCCL knows no other.
            summed = strategy.reduce(tensor.to(strategy.root_device), reduce_op="sum")
            assert isinstance(summed, Tensor)
            return summed

        collector = reading.collector
        collector.merge(total)
        if self.trainer.is_global_zero:
            path = save_to_cache(collector, self._source_of_text())
            error = collector.error
            bar = "" if error is None else f" (± {100 * error:.2g} %)"
            self.print(f"key statistics of {collector.tokens} tokens{bar} are in {path}")
        strategy.barrier()
        reading.discard()
        self._pass = None
        self.forget_statistics()
        self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring the cache up to where the checkpoint stands."""
        super().on_save_checkpoint(checkpoint)
        if self._pass is not None:
            self._pass.save()

    def forget_statistics(self) -> None:
        """Drop what was derived from statistics that are replaced now."""

    @property
    def _reading(self) -> TextPass:
        assert self._pass is not None
        return self._pass

    def _is_enough(self, collector: KeyCollector) -> bool:
        """Whether this process has read its share, by what it has read itself."""
        processes = self.trainer.world_size
        tokens, wanted = self.hparams["fit_tokens"], self.hparams["fit_error"]
        if tokens is not None and collector.tokens * processes >= tokens:
            return True
        return wanted is not None and collector.is_within(wanted, processes)

    def _source_of_text(self) -> str:
        source = self.run.data.source if isinstance(self.run.data, Texts) else {}
        return str(source.get("path") or source.get("hub") or "text")
