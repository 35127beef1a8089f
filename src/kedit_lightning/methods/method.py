"""The base class of all editing methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.benchmark import ProtocolRunner, RunContext
from kedit_lightning.benchmark.free_answers import free_answers
from kedit_lightning.benchmark.quality import judged
from kedit_lightning.benchmark.run_context import PromptBatch, ignore
from kedit_lightning.contradictions import OnConflict, settle
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.edits import CompositeEdit, Edit, EditOrigin
from kedit_lightning.edits.compilation import eager_gradients
from kedit_lightning.errors import InvalidRequestError, NothingToFitError, UnsupportedUseError
from kedit_lightning.methods.capabilities import (
    Capabilities,
    MethodSettings,
    Need,
    check_needs,
    plain,
    public_path,
    warn_of_changes,
    warn_of_other_base,
)
from kedit_lightning.methods.shared.data_setup import refuse_images, set_up_data
from kedit_lightning.methods.shared.joint_edits import JointMethod, single_facts
from kedit_lightning.methods.shared.random_numbers import request_generator
from kedit_lightning.methods.shared.row_lengths import RowText, Window, example_rows, too_long
from kedit_lightning.methods.shared.target_probability import note_probabilities, warn_of_unwritten
from kedit_lightning.metrics import SummaryRow
from kedit_lightning.requests import EditBatch, EditExample, EditRequest

__all__ = ["Capabilities", "EditMethod", "MethodSettings", "Need", "as_edit_method", "plain"]


class EditMethod(pl.LightningModule):
    """Computes edits from requests.

    Subclasses define :meth:`compute_edit`; those that learn something before any request also
    define ``training_step``.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        seed: Seed of all random choices; together with the requests it fixes them. That of the run
            (``seed_everything``) when absent.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    needs_to_fit: ClassVar[frozenset[Need]] = frozenset()
    can: ClassVar[Capabilities] = Capabilities()
    writes_facts: ClassVar[bool] = True  # else it takes none just as well
    #: What ``fit`` learns, in words; empty for methods that learn nothing before their requests.
    learns: ClassVar[str] = ""
    #: The dataclass of the method's settings.
    settings_type: ClassVar[type[MethodSettings]] = MethodSettings
    #: The settings, with what was left to the base model resolved once the method is built.
    settings: MethodSettings
    #: The settings as the constructor got them.
    given: MethodSettings
    #: Settings that are no plain values and are left out of checkpoints and edit files.
    unsaved: ClassVar[tuple[str, ...]] = ("base_model",)
    #: Examples that ``fit`` takes at a time.
    fit_batch_size: int = 1
    #: Passes over the data that ``fit`` makes at most; as many as the trainer says when ``None``.
    fit_epochs: ClassVar[int | None] = None
    #: The run that is under way; a trainer attaches its own.
    run: RunContext
    #: Runs the present pass over a split.
    runner: ProtocolRunner
    #: Scores of the last run with their intervals.
    summary: Sequence[SummaryRow] = ()

    def __init__(
        self, base_model: BaseModel | BaseModelSpec | str = "nano", seed: int | None = None
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=list(self.unsaved))
        self.given = self.settings_type.read(self.hparams)
        self.settings = replace(self.given, seed=self.given.start)
        self.run = RunContext()
        # No submodule: absent from checkpoints, optimizers and DDP buckets.
        self._base_model = base_model
        self._built = False

    # ---- what a method defines

    @abstractmethod
    def compute_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Compute the edit that writes the requests, on top of the stack as it stands.

        Gradients are enabled.  Methods that cannot do batches get one request.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define compute_edit")

    def build(self) -> None:
        """Check the base model and create what depends on its shape; called once."""

    @property
    def base(self) -> BaseModel:
        """The base model, loaded when first asked for."""
        if not isinstance(self._base_model, BaseModel):
            self._base_model = BaseModel.load(self._base_model)
        return self._base_model

    def configure_model(self) -> None:
        """Load the base model and build what depends on it; does nothing the second time.

        Raises:
            UnsupportedUseError: A setting is out of bounds, or the model is of another kind than
                those the method can edit.
            NonFiniteError: The base model's weights hold NaN.
        """
        if not self._built:
            self.given.check_bounds(type(self).__name__)
            self.can.check_base(type(self).__name__, self.base)
            self.base.check_finite()
            self.build()
            self._built = True

    # ---- editing

    def edit(self, requests: Sequence[EditRequest], on_conflict: OnConflict = "last") -> Edit:
        """Compute an edit on top of those applied now; the model does not change until ``apply``.

        A method that writes one fact at a time writes several one after another.  An edit notes the
        probability of each target (``target_probabilities``); one warning counts those below half.

        Args:
            requests: The facts to write.
            on_conflict: What is done where requests give one fact different answers: the ``last``
                one is written, with a warning, or all are refused.

        Raises:
            InvalidRequestError: There is no request, or some contradict each other and shall not.
            MissingNeedsError: A request lacks something the method needs.
            NonFiniteError: The computation gave NaN or infinity.
        """
        given, requests = list(requests), settle(requests, on_conflict)
        warn_of_changes(given, requests)
        edit = self.noted_edit(requests)
        warn_of_unwritten(type(self).__name__, edit, requests, self.settings)
        return edit

    def noted_edit(self, requests: Sequence[EditRequest]) -> Edit:
        """The edit of :meth:`edit`, without its warnings: a run says itself what is written."""
        requests = settle(requests, "last")
        with self.computing(requests):
            if self.can.batch or len(requests) == 1:
                edit = self.compute_edit(requests)
            else:
                origin = self.origin(requests)
                with self.base.edits.restored():
                    # Each is applied before the next is computed.
                    members = [self.noted_edit([request]).apply() for request in requests]
                edit = CompositeEdit(self.base, members, origin)
            note_probabilities(edit, requests)
            return edit

    @contextmanager
    def computing(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        """Check requests as :meth:`edit` does, and build; inside, gradients are enabled."""
        if not requests and self.writes_facts:
            raise InvalidRequestError("edit() got no requests; give at least one EditRequest")
        self.check_requests(requests)
        self.configure_model()
        uncast = torch.autocast(self.base.device.type, enabled=False)
        with self.base.edits.lock, self.base.identity.held(), eager_gradients(), uncast:
            yield

    def edit_each(self, requests_of_examples: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
        """Compute the edits of several examples independently of each other; none is applied.

        Each is what :meth:`edit` gives for its requests.  A method that is faster on several at
        once is a :class:`JointMethod`; it draws random numbers from :meth:`generator` alone.
        """
        if len(requests_of_examples) > 1 and isinstance(self, JointMethod):
            return single_facts(self, requests_of_examples)
        return map(self.noted_edit, requests_of_examples)

    def origin(self, requests: Sequence[EditRequest], **notes: Any) -> EditOrigin:
        """What an edit records about where it comes from."""
        # Those of a plug-in without a dataclass, less what Lightning adds for itself.
        given = {name: value for name, value in self.hparams.items() if not name.startswith("_")}
        short, full = self.base.fingerprints
        return EditOrigin(
            method=type(self).__name__,
            settings=plain({**given, **asdict(self.settings)}),
            requests=tuple(requests),
            base_model=self.base.name,
            fingerprint=short,
            full_fingerprint=full,
            tokenizer_fingerprint=self.base.tokenizer_fingerprint,
            stack=self.base.edits.mark,
            notes=plain(notes),
        )

    def generator(self, requests: Sequence[EditRequest], purpose: str = "") -> torch.Generator:
        """Random numbers that depend on the seed, the requests and the purpose alone."""
        return request_generator(self.settings.seed, requests, purpose)

    # ---- needs

    def check_learns(self) -> None:
        """Raise :class:`NothingToFitError` if the method learns nothing before its requests."""
        if not self.learns:
            raise NothingToFitError(
                f"{type(self).__name__} learns nothing before its requests, so there is nothing to "
                "fit; run `kedit edit` or `kedit test` with it"
            )

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        """Make sure that requests carry what the method needs, as :func:`check_needs` does.

        Raises:
            UnsupportedUseError: Names every request with an image, if it reads none.
        """
        refuse_images(type(self).__name__, requests, self.can.images)
        check_needs(type(self).__name__, requests, self.needs)

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """The same for examples to be edited, and for the probes of examples to be fitted on."""
        if fitting:
            check_needs(type(self).__name__, examples, self.needs_to_fit)
        else:
            self.check_requests([r for example in examples for r in example.requests])

    def rows_of(self, example: EditExample) -> list[RowText]:
        """The rows that the base model reads of an example, as :meth:`too_long` measures them."""
        return example_rows(example)

    def too_long(self, examples: Sequence[EditExample]) -> dict[str, str]:
        """The examples that do not fit into the base model's window: why, by id."""
        return too_long(Window.of(self.base), examples, list(map(self.rows_of, examples)))

    def examples_to_fit(self, examples: Sequence[EditExample]) -> list[EditExample]:
        """The examples that ``fit`` learns from: all, unless a method leaves some out."""
        return list(examples)

    def setup(self, stage: str) -> None:
        """Check settings and data; raises what :func:`set_up_data` does, too.

        Raises:
            NothingToFitError: ``fit`` was called on a method that learns nothing.
            UnsupportedUseError: A setting is out of bounds.
        """
        self.given.check_bounds(type(self).__name__)
        if stage == "fit":
            self.check_learns()
        if self.run.on_edit is ignore:  # the trainer attaches no context
            self.run = RunContext.under(self.trainer)
        if isinstance(self.run.data, EditDataModule):
            set_up_data(self, self.run.data, stage)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Learn from a batch; only methods that learn something define it."""
        self.check_learns()

    def configure_optimizers(self) -> Any:
        """No optimizer, unless a method has one."""
        return None

    # ---- test, validate and predict

    def on_test_epoch_start(self) -> None:
        """Begin a pass over the split that is tested or validated."""
        run, trainer = self.run, self.trainer
        if trainer.state.fn == "fit":  # free answers would take longer than the training
            run = replace(run, protocol=replace(run.protocol, generate=False))
        split: Split = "test" if trainer.testing else "validation"
        ranks = trainer.global_rank, trainer.world_size
        self.runner = ProtocolRunner(self.base, self.noted_edit, run, split, self.edit_each, ranks)
        self.runner.metrics.to(self.device)
        chunks = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
        self.runner.chunks = sum(chunks)

    def test_step(self, batch: EditBatch, batch_idx: int) -> None:
        """Edit and score one chunk."""
        for record in self.runner.chunk(batch.examples, batch_idx):
            self.runner.metrics.update(record)

    def on_test_epoch_end(self) -> None:
        """Score what is scored at the end, and log all scores."""
        metrics, prefix = self.runner.metrics, "" if self.trainer.testing else "val/"
        for record in self.runner.finish():
            metrics.update(record)
        self.close_evaluation()
        self.summary, scores = metrics.summary(), metrics.compute()
        if prefix and (score := judged(scores)["score"]) is not None:
            scores["score"] = score  # one number for early stopping and for the best checkpoint
        # Equal on all ranks already; Lightning warns unless it is told to make them so.
        sync = self.trainer.world_size > 1
        self.log_dict({f"{prefix}{key}": value for key, value in scores.items()}, sync_dist=sync)

    on_validation_epoch_start, validation_step = on_test_epoch_start, test_step
    on_validation_epoch_end = on_test_epoch_end

    def close_evaluation(self) -> None:
        """Restore the stack as it was before a pass, however it ended."""
        if "runner" in vars(self):
            self.runner.close()
            del self.runner

    def predict_step(self, batch: PromptBatch | EditBatch, batch_idx: int) -> list[dict[str, str]]:
        """Answer each ``prompt`` without (``base``) and with the applied edits (``edited``)."""
        return free_answers(self.base, batch.prompts, self.run.protocol, batch.images)

    # ---- checkpoints

    @property
    def strict_loading(self) -> bool:
        """Off: checkpoints hold what was learned, which may be less than the module's state."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        """Ignored; Lightning sets it when it loads a checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the class, and the base model that the method was fitted on."""
        settings = checkpoint.setdefault("hyper_parameters", {})
        settings["_class_path"] = public_path(type(self))
        settings.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")
        names = ("name", "fingerprint", "weights_fingerprint", "tokenizer_fingerprint")
        checkpoint["base_model"] = {name: getattr(self.base, name) for name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn when the checkpoint was fitted on another base model."""
        warn_of_other_base(checkpoint.get("base_model", {}), self.base)


def as_edit_method(module: object) -> EditMethod:
    """The editing method that a trainer or a callback was given; other modules are refused."""
    if isinstance(module, EditMethod):
        return module
    raise UnsupportedUseError(
        f"{type(module).__name__} is no editing method; give a class of kedit_lightning.methods, "
        "or one derived from EditMethod"
    )
