"""The trainer that edits."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from rich.console import Console

from kedit_lightning import runs
from kedit_lightning.benchmark import Protocol, RunContext
from kedit_lightning.benchmark.edit_callback import announce, check_callbacks
from kedit_lightning.edits import Edit
from kedit_lightning.errors import UnsupportedUseError
from kedit_lightning.methods.capabilities import check_mode
from kedit_lightning.methods.method import EditMethod, as_edit_method
from kedit_lightning.methods.shared.target_probability import ways_out
from kedit_lightning.methods.training.checkpoint import load_checkpoint
from kedit_lightning.metrics import ExampleRecord
from kedit_lightning.notices import without_notices
from kedit_lightning.runs.data_source import data_source
from kedit_lightning.runs.fit_folder import FitFolder
from kedit_lightning.runs.fit_length import at_most
from kedit_lightning.runs.held_facts import HeldFacts
from kedit_lightning.runs.interruption import interruptible
from kedit_lightning.runs.ledger_stream import ledger_stream
from kedit_lightning.runs.model_export import saved_edits
from kedit_lightning.runs.output_folder import OutputFolder, opened
from kedit_lightning.runs.processes import check_processes, processes_here
from kedit_lightning.runs.prompts import check_prompts, prompt_loader, read_prompts
from kedit_lightning.runs.results import predictions_table, summary_table, tell
from kedit_lightning.runs.saved_stack import apply_saved, edits_to_answer_under
from kedit_lightning.runs.stream_orders import orders_of, tell_spread


class EditTrainer(Trainer):
    """Lightning's trainer, with ``edit``, protocols and output folders.

    Args:
        protocol: How edits are applied and scored.
        callbacks: Callbacks beside the usual ones; one of the same class replaces a usual one.
        usual_callbacks: Guard the base model, save edits and results, show tables, draw a fit.
        logger: Where scores and losses are logged; nowhere unless given.
        default_root_dir: Folder for checkpoints of ``fit`` and for logs; ``outputs`` if not given.
        inference_mode: Off, because edits are computed with gradients.
        devices: Devices to compute on; one if not given, or one for each process of torchrun.
        enable_progress_bar: Show progress; only on a terminal if not given.
        num_sanity_val_steps: Batches validated before a fit starts, when nothing is learned yet.
        **kwargs: Passed to Lightning's trainer.
    """

    def __init__(
        self,
        *,
        protocol: Protocol = Protocol(),  # noqa: B008 - it is frozen
        callbacks: list[Callback] | Callback | None = None,
        usual_callbacks: bool = True,
        logger: Logger | Iterable[Logger] | bool | None = False,
        default_root_dir: str | Path | None = None,
        inference_mode: bool = False,
        devices: list[int] | str | int | None = None,
        enable_progress_bar: bool | None = None,
        num_sanity_val_steps: int | None = 0,
        **kwargs: Any,
    ) -> None:
        given = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
        bar = sys.stderr.isatty() if enable_progress_bar is None else enable_progress_bar
        # Loaded by name: type checkers do not see the folder that callbacks are kept in.
        kinds: Any = import_module("kedit_lightning.callbacks")
        usual = kinds.usual_callbacks() if usual_callbacks else []
        usual = [c for c in usual if not any(isinstance(other, type(c)) for other in given)]
        with without_notices():
            super().__init__(
                callbacks=[*usual, *given],
                logger=logger,
                default_root_dir="outputs" if default_root_dir is None else default_root_dir,
                inference_mode=inference_mode,
                devices=processes_here() if devices is None else devices,
                enable_progress_bar=bar,
                num_sanity_val_steps=num_sanity_val_steps,
                **kwargs,
            )
        check_callbacks(self.callbacks)  # type: ignore[attr-defined]
        check_processes(self.world_size, self.strategy)
        self.protocol = protocol
        self.output_folder: OutputFolder | None = None
        self.fit_folder = FitFolder(self.default_root_dir, self.checkpoint_callbacks)
        self._edits, self._records = list[Edit](), list[ExampleRecord]()

    def _take_edit(self, name: str, edit: Edit) -> None:
        self._edits += [edit] if self._keeps_edits else []
        announce(self, "on_edit", name, edit)

    def _take_record(self, record: ExampleRecord, edit: Edit | None) -> None:
        self._records += [record] if self._keeps_edits else []
        announce(self, "on_example_result", record, edit)

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        output: str | Path | None = None,
    ) -> None:
        """Learn once what later edits share: a hypernetwork, or statistics of keys.

        Args:
            model: The editing method.
            train_dataloaders: Where batches come from, or a data module.
            val_dataloaders: Where batches for validation come from.
            datamodule: Where batches come from.
            ckpt_path: Checkpoint of an interrupted fit to continue.
            weights_only: Passed to ``torch.load``.
            output: Folder for checkpoints and the picture; ``default_root_dir`` if not given.
        """
        method = as_edit_method(model)
        method.check_learns()
        train_dataloaders, datamodule = data_source("fit", train_dataloaders, datamodule)
        self.fit_folder.open(output, ckpt_path, self.is_global_zero)
        self._default_root_dir = str(self.fit_folder.path)  # where callbacks of a fit write
        with (
            self._running("fit", model, datamodule, ckpt_path),
            at_most(self.fit_loop, method.fit_epochs),
        ):
            super().fit(
                model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only
            )
        if self.is_global_zero and model.state_dict() and (note := self.fit_folder.note()):
            tell(note)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
    ) -> list[Any]:
        """Run a benchmark on the validation split and report scores.

        Args:
            model: The editing method.
            dataloaders: Where examples come from, or a data module.
            ckpt_path: Checkpoint of a fitted method.
            verbose: Print the scores.
            datamodule: Where examples come from.
            weights_only: Passed to ``torch.load``.

        Returns:
            A dictionary of scores.
        """
        dataloaders, datamodule = data_source("validate", dataloaders, datamodule)
        with self._running("validate", model, datamodule, ckpt_path, verbose=verbose):
            return super().validate(model, dataloaders, ckpt_path, False, datamodule, weights_only)

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        output: str | Path | None = None,
        resume: str | Path | None = None,
    ) -> list[Any]:
        """Run a benchmark under a protocol and report scores with confidence intervals.

        Args:
            model: The editing method.
            dataloaders: Where examples come from, or a data module.
            ckpt_path: Checkpoint of a fitted method.
            verbose: Print the scores.
            datamodule: Where examples come from.
            weights_only: Passed to ``torch.load``.
            output: Folder for results and edits; nothing is written without it.
            resume: Output folder of an interrupted run to continue, with the same settings.

        Returns:
            A dictionary of scores, one for each order of the protocol.
        """
        dataloaders, datamodule = data_source("test", dataloaders, datamodule)
        arguments = (model, dataloaders, ckpt_path, False, datamodule, weights_only)
        given, found, rows = self.protocol, list[Any](), list[Any]()
        try:
            for self.protocol, own, again in orders_of(given, datamodule, output, resume):
                run = self._running("test", model, datamodule, ckpt_path, own, again, verbose)
                with run as method:
                    found += super().test(*arguments)
                rows.append(method.summary)
        finally:
            self.protocol = given
        tell_spread(rows, output if resume is None else resume, verbose)
        return found

    def edit(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        output: str | Path | None = None,
        resume: str | Path | None = None,
        export: Literal["model", "adapter", "gguf-lora"] | None = None,
        export_rank: int | None = None,
        strict: bool = False,
        ledger: str | Path | None = None,
    ) -> list[Edit]:
        """Write requests so that they hold together, show what they do, and save the edits.

        In one batch if the method can, else in sequence; in mode ``single`` each on its own. All
        are scored on the final stack, as ``predict`` answers.

        Args:
            model: The editing method.
            datamodule: Where the requests come from.
            ckpt_path: Checkpoint of a fitted method.
            output: Folder for edits and results; nothing is written without it.
            resume: Output folder of an interrupted run to continue, with the same settings.
            export: Also write the edited model: ``model`` as a Hugging Face folder, or a LoRA
                adapter: ``adapter`` in peft's format, ``gguf-lora`` for llama.cpp and Ollama.
            export_rank: Cut the adapter off at this rank, and say what is lost.
            strict: Facts that do not hold are an error (exit code 3) once the edits are saved.
            ledger: Ledger that the edits are added to, on top of those that stand in it.

        Returns:
            The edits, rolled back, in their order.
        """
        datamodule = data_source("edit", None, datamodule)[1]
        runs.check_export(export, as_edit_method(model).can, output or resume, export_rank)
        self._edits, self._records, others = [], [], (output, resume, export, ckpt_path)
        with (
            self._running("edit", model, datamodule, ckpt_path, output, resume) as method,
            ledger_stream(ledger, method, datamodule, others, self.world_size),
        ):
            folder = self.output_folder
            super().test(model, None, ckpt_path, False, datamodule)
        if not self.is_global_zero:
            return self._edits
        records = folder.records() if folder else self._records
        facts = HeldFacts.of(records, datamodule, whole=self.world_size == 1)
        if folder is not None:
            self._edits = saved_edits(folder.path, method.base, export, export_rank)
        tell(facts.concluded(ways_out(method.settings, method.writes_facts), strict))
        return self._edits

    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
        edits: str | Path | None = None,
        prompts: str | Path | None = None,
        prompt: list[str] | str | None = None,
        verbose: bool = True,
        force: bool = False,
    ) -> list[Any]:
        """Answer prompts with and without saved edits, or the edit of a method without facts.

        Args:
            model: The editing method, for its base model.
            dataloaders: Where prompts come from instead, or a data module.
            datamodule: Where prompts come from if none are given.
            return_predictions: Not used; answers are always returned.
            ckpt_path: Checkpoint of a fitted method.
            weights_only: Passed to ``torch.load``.
            edits: Output folder of ``edit`` or ``test``, or one saved edit.
            prompts: File with one prompt per line, or a JSON list.
            prompt: A prompt, or several.
            verbose: Print the answers.
            force: Apply edits even if they were made for another base model, as long as they fit.

        Returns:
            For each prompt, the answer of the base model and that under the edits.
        """
        if asked := read_prompts(prompts, prompt):
            dataloaders, datamodule = prompt_loader(asked, self.protocol.score_batch_size), None
        elif dataloaders is None and datamodule is None:
            raise UnsupportedUseError(
                "predict was given no prompt; add --prompt TEXT, --prompts FILE, or --data DATASET"
            )
        dataloaders, datamodule = data_source("predict", dataloaders, datamodule)
        running = self._running("predict", model, datamodule, ckpt_path)
        with running as method, method.base.edits.restored():
            apply_saved(edits_to_answer_under(method, edits, force))
            check_prompts(method.base, asked)
            applied = len(method.base.edits)
            batches = super().predict(model, dataloaders, datamodule, True, ckpt_path, weights_only)
        answers = [answer for batch in batches or [] for answer in batch]
        if verbose and self.is_global_zero:
            Console().print(predictions_table(answers, applied))
        return answers

    @contextmanager
    def _running(
        self,
        command: str,
        model: LightningModule | None,
        data: LightningDataModule | None,
        ckpt_path: str | Path | None,
        output: str | Path | None = None,
        resume: str | Path | None = None,
        verbose: bool = False,
    ) -> Iterator[EditMethod]:
        """Open the output, attach the run to its method, and leave the stack as it was."""
        method = as_edit_method(model or self.lightning_module)
        evaluates = command not in ("fit", "predict")
        if evaluates:
            check_mode(type(method).__name__, method.can, self.protocol.grouping)
        if ckpt_path is not None and Path(ckpt_path).is_file():  # and no word such as "best"
            load_checkpoint(Path(ckpt_path))
        first, editing = self.is_global_zero, command == "edit"
        with opened(output, resume, first) as folder, interruptible(folder, first):
            self.output_folder = folder
            self._keeps_edits = editing and (folder is None or not first)
            method.run = RunContext(
                self.protocol,
                data=data,
                output=folder,
                editing=editing,
                on_computed=partial(announce, self, "on_computed_edit"),
                on_edit=self._take_edit,
                on_record=self._take_record,
                on_checkpoint=partial(announce, self, "on_stream_checkpoint"),
            )
            try:
                with without_notices():
                    if evaluates:  # the state of a fit's callbacks is of no use here
                        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, c")
                    yield method
                if verbose and method.summary and first:
                    title = f"{type(method).__name__}, {self.protocol.grouping} edits ({command})"
                    Console().print(summary_table(method.summary, title))
            finally:
                method.close_evaluation()
                method.run, self.output_folder = RunContext(), None
