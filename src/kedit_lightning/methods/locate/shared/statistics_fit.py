"""``fit`` of the closed-form methods: one pass over text that collects statistics of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kedit_lightning.data.text.texts import TextBatch, Texts
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.locate.shared.closed_form_settings import ClosedFormSettings
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.statistics import KeyCollector, TextPass, keyed_projections, save_to_cache


class StatisticsFit:
    """One pass over text that sums the second moments of the keys of every layer in the cache.

    Of blocks with routed experts alone it is those that the method edits.  A pass that was
    interrupted is continued.
    """

    def __init__(
        self, method: EditMethod, settings: ClosedFormSettings, layers: Sequence[int]
    ) -> None:
        self._method, self._settings, self._trainer = method, settings, method.trainer
        modules = keyed_projections(method.base.layout, layers)
        self._collector = KeyCollector(method.base, modules, settings.fit_length)
        loader: Any = self._trainer.train_dataloader
        state = loader.state_dict() if hasattr(loader, "state_dict") else {}
        identity = state.get("identity", {})
        self.text_pass = TextPass(self._collector, identity, self._trainer.global_rank)
        if self.text_pass.batches:
            method.print(
                f"continuing a fit that was interrupted after {self.text_pass.batches} batches "
                f"({self._collector.tokens} tokens); they are not read again"
            )

    def has_enough(self, batch_idx: int) -> bool:
        """Whether the processes together have read enough, before a batch."""
        tokens, error = self._settings.fit_tokens, self._settings.fit_error
        if tokens is None and error is None:
            return False
        # Each judges its share by its own sums.
        collector, processes = self._collector, self._trainer.world_size
        enough = tokens is not None and collector.tokens * processes >= tokens
        enough = enough or (error is not None and collector.is_within(error, processes))
        enough = enough and self.text_pass.is_new(batch_idx)
        # Decided together, as Lightning's processes wait for each other at every batch.
        return bool(self._trainer.strategy.reduce_boolean_decision(enough))

    def read(self, batch: object, batch_idx: int) -> None:
        """Add the keys of a batch of texts.

        Raises:
            UnsupportedUseError: The batch is no plain text.
        """
        if not isinstance(batch, TextBatch):
            raise UnsupportedUseError(
                f"{type(self._method).__name__} is fitted on plain text; use --data Texts "
                "--data.path FOLDER"
            )
        self.text_pass.read(batch_idx, batch.texts)

    def finish(self) -> None:
        """Add up the sums of all processes and write the statistics to the cache."""
        strategy = self._trainer.strategy
        self.text_pass.check_complete()

        def total(tensor: Tensor) -> Tensor:
            # On the strategy's device: NCCL knows no other.
            summed = strategy.reduce(tensor.to(strategy.root_device), reduce_op="sum")
            assert isinstance(summed, Tensor)
            return summed

        self._collector.merge(total)
        if self._trainer.is_global_zero:
            data = self._method.run.data
            source = data.source if isinstance(data, Texts) else {}
            text = source.get("path") or source.get("hub") or "text"
            path = save_to_cache(self._collector, str(text))
            error = self._collector.error
            margin = "" if error is None else f" (± {100 * error:.2g} %)"
            collector = self._collector
            self._method.print(
                f"key statistics of {collector.tokens} tokens{margin} are in {path}: all those of "
                f"{collector.texts} texts, read in rows of at most {collector.max_tokens}"
            )
        strategy.barrier()
        self.text_pass.discard()
        self._trainer.should_stop = True


class TextPassHooks:
    """Lightning's hooks of a method whose ``fit`` is such a pass."""

    settings: Any
    layers: Sequence[int]
    covariances: Any
    _fit: StatisticsFit | None = None

    def on_train_start(self) -> None:
        """Start a pass over text, or continue an interrupted one."""
        assert isinstance(self, EditMethod)
        self._fit = StatisticsFit(self, self.settings, self.layers)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """End the pass once it has read enough."""
        assert self._fit is not None
        return -1 if self._fit.has_enough(batch_idx) else None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Add the keys of a batch of texts."""
        assert self._fit is not None
        self._fit.read(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        """Write the statistics to the cache; one pass is all there is to do."""
        assert self._fit is not None
        self._fit.finish()
        self._fit = None
        self.covariances.clear()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the sums so far to the cache, as far as the checkpoint stands."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        if self._fit is not None:
            self._fit.text_pass.save()
