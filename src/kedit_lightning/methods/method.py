"""What all editing methods share."""

from __future__ import annotations

import hashlib
import json
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, TypeAlias

import lightning.pytorch as pl
import torch

from kedit_lightning.base_models import BaseModel, BaseModelSpec
from kedit_lightning.benchmark import EvaluationSteps
from kedit_lightning.edits import CompositeEdit, Edit, EditOrigin
from kedit_lightning.errors import (
    InvalidRequestError,
    MissingNeedsError,
    NothingToFitError,
    UnsupportedUseError,
    article_list,
)
from kedit_lightning.requests import EditExample, EditRequest

#: What a method may need of every request, or of the examples it is fitted on.
Need: TypeAlias = Literal["subject", "target_old", "task", "rephrases", "locality"]


@dataclass(frozen=True)
class Capabilities:
    """What a method can do.

    Args:
        batch: Writes several facts in one computation; otherwise they are written one by one.
        sequential: Keeps earlier edits in force while it writes new ones.
        quantised: Works on weights that are quantised.
        encoder_decoder: Works on models with an encoder and a decoder.
        adapter: Its edits can be exported as a LoRA adapter.
        weights: Its edits can be exported as a full model.
    """

    batch: bool = True
    sequential: bool = True
    quantised: bool = True
    encoder_decoder: bool = False
    adapter: bool = False
    weights: bool = False


@dataclass(frozen=True)
class MethodSettings:
    """Settings of a method: its constructor's parameters without the base model.

    A method has a dataclass of its own that lists them with their types; defaults stand in the
    constructor alone.  ``build`` replaces what was left to the base model by the values used.

    Args:
        seed: Start of all random choices.
    """

    seed: int

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Read them from the parameters that the constructor got."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})


class EditMethod(EvaluationSteps, pl.LightningModule):
    """A way to turn requests into an edit.

    Subclasses define :meth:`compute_edit`; those that learn something before any request also
    define ``training_step``.

    Args:
        base_model: The model to edit: an object, a specification, or a name.
        seed: Start of all random choices; together with the requests it fixes them.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    needs_to_fit: ClassVar[frozenset[Need]] = frozenset()
    can: ClassVar[Capabilities] = Capabilities()
    #: What ``fit`` learns, in words; empty for methods that learn nothing before their requests.
    learns: ClassVar[str] = ""
    #: The dataclass of the method's settings.
    settings_type: ClassVar[type[MethodSettings]] = MethodSettings
    #: The settings, with what was left to the base model resolved once the method is built.
    settings: MethodSettings
    #: Settings that are no plain values and so stay out of checkpoints and edit files.
    unsaved: ClassVar[tuple[str, ...]] = ("base_model",)
    #: Examples that ``fit`` takes at a time.
    fit_batch_size: int = 1

    def __init__(self, base_model: BaseModel | BaseModelSpec | str = "nano", seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=list(self.unsaved))
        self.settings = self.settings_type.read(self.hparams)
        # Kept out of nn.Module's registers: the base model is no part of the method, so it is
        # absent from checkpoints, optimizers and DDP buckets.
        self.__dict__["_source"] = base_model
        self.__dict__["_base"] = base_model if isinstance(base_model, BaseModel) else None
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

    # ---- the base model

    @property
    def base(self) -> BaseModel:
        """The base model, loaded when first asked for."""
        if self.__dict__["_base"] is None:
            self.__dict__["_base"] = BaseModel.load(self.__dict__["_source"])
        base: BaseModel = self.__dict__["_base"]
        return base

    def configure_model(self) -> None:
        """Load the base model and build what depends on it; does nothing the second time.

        Raises:
            UnsupportedUseError: The method cannot edit a model of this kind.
            NonFiniteError: The base model's weights hold NaN.
        """
        if self._built:
            return
        name = type(self).__name__
        if self.base.is_encoder_decoder and not self.can.encoder_decoder:
            raise UnsupportedUseError(
                f"{name} edits decoder-only models, and '{self.base.name}' has an encoder and a "
                "decoder; use a method whose row in the support matrix says so"
            )
        if getattr(self.base.model, "is_quantized", False) and not self.can.quantised:
            raise UnsupportedUseError(
                f"{name} cannot edit quantised weights; load '{self.base.name}' without "
                "quantization"
            )
        self.base.check_finite()
        self.build()
        self._built = True

    # ---- editing

    def edit(self, requests: Sequence[EditRequest]) -> Edit:
        """Compute an edit; the model does not change until it is applied.

        It is computed on top of the edits that are applied now.  A method that writes one fact at
        a time writes several one after another.

        Raises:
            InvalidRequestError: There is no request.
            MissingNeedsError: A request lacks something the method needs.
            NonFiniteError: The computation gave NaN or infinity.
        """
        requests = list(requests)
        with self.computing(requests):
            if self.can.batch or len(requests) == 1:
                return self.compute_edit(requests)
            return self._one_by_one(requests)

    @contextmanager
    def computing(self, requests: Sequence[EditRequest]) -> Iterator[None]:
        """Check requests and build what is needed; inside, gradients are enabled.

        Raises:
            InvalidRequestError: There is no request.
            MissingNeedsError: A request lacks something the method needs.
        """
        if not requests:
            raise InvalidRequestError("edit() got no requests; give at least one EditRequest")
        self.check_requests(requests)
        self.configure_model()
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.base.device.type, enabled=False),
        ):
            yield

    def edit_each(self, requests_of_examples: Sequence[Sequence[EditRequest]]) -> Iterable[Edit]:
        """Edits of several examples, apart from each other: none is applied.

        Each is what :meth:`edit` gives for its requests on top of the stack as it stands.  Here
        each is computed when it is asked for, so that large edits need not be held together.  A
        method that computes independent edits faster together returns them in a list; it draws
        random numbers from :meth:`generator` alone, since global ones would depend on which edits
        are computed together, and reports of time share its own out evenly among them.

        Args:
            requests_of_examples: The requests of each example.
        """
        return map(self.edit, requests_of_examples)

    def _one_by_one(self, requests: list[EditRequest]) -> Edit:
        origin = self.origin(requests)
        with self.base.edits.restored():
            # Each is applied before the next is computed.
            members = [self.compute_edit([request]).apply() for request in requests]
        return CompositeEdit(self.base, members, origin)

    def origin(self, requests: Sequence[EditRequest], **notes: Any) -> EditOrigin:
        """What an edit records about where it comes from."""
        return EditOrigin(
            method=type(self).__name__,
            settings=plain({**self.hparams, **asdict(self.settings)}),
            requests=tuple(requests),
            base_model=self.base.name,
            fingerprint=self.base.fingerprint,
            tokenizer_fingerprint=self.base.tokenizer_fingerprint,
            stack=self.base.edits.ids,
            notes=plain(notes),
        )

    def generator(self, requests: Sequence[EditRequest], purpose: str = "") -> torch.Generator:
        """Random numbers that depend on the seed, the requests and the purpose alone."""
        text = json.dumps(
            [self.settings.seed, purpose, [(r.prompt, r.target_new) for r in requests]]
        )
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(number)

    # ---- needs

    def check_requests(self, requests: Sequence[EditRequest]) -> None:
        """Make sure that requests carry what the method needs.

        Raises:
            MissingNeedsError: Names every request that lacks something, and the field.
        """
        fields = [f for f in ("subject", "target_old", "task") if f in self.needs]
        missing = [
            f"{request.label} lacks '{field}'"
            for request in requests
            for field in fields
            if getattr(request, field) is None
        ]
        self._refuse_missing(missing)

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Make sure that examples carry what the method needs to edit, or to be fitted.

        Raises:
            MissingNeedsError: Names every example that lacks something, and the field.
        """
        if not fitting:
            self.check_requests([r for example in examples for r in example.requests])
            return
        kinds = {"rephrases": "rephrase", "locality": "locality"}
        missing = [
            f"example '{example.id}' lacks '{need}'"
            for example in examples
            for need in sorted(self.needs_to_fit & kinds.keys())
            if not any(probe.kind == kinds[need] for probe in example.probes)
        ]
        self._refuse_missing(missing)

    def _refuse_missing(self, missing: list[str]) -> None:
        if missing:
            raise MissingNeedsError(
                f"{type(self).__name__} needs more than the data gives: {article_list(missing)}; "
                "add it to the records, or choose a method that does without"
            )

    def examples_to_fit(self, examples: Sequence[EditExample]) -> list[EditExample]:
        """The examples that ``fit`` learns from: all, unless a method leaves some out."""
        return list(examples)

    # ---- Lightning

    def setup(self, stage: str) -> None:
        """Check needs before the base model is loaded.

        Raises:
            NothingToFitError: ``fit`` was called on a method that learns nothing.
            MissingNeedsError: An example lacks something the method needs.
        """
        if stage == "fit" and not self.learns:
            raise NothingToFitError(
                f"{type(self).__name__} learns nothing before its requests, so there is nothing to "
                "fit; run `kedit edit` or `kedit test` with it"
            )
        datamodule = getattr(self.trainer, "datamodule", None)
        examples = getattr(datamodule, "examples", None)
        if examples is None:
            return
        if stage == "fit":
            if self.needs_to_fit:
                self.check_examples(self.examples_to_fit(examples("train")), fitting=True)
        else:
            self.check_examples(examples("validation" if stage == "validate" else "test"))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Learn from a batch; only methods that learn something define it."""
        raise NothingToFitError(f"{type(self).__name__} learns nothing before its requests")

    def configure_optimizers(self) -> Any:
        """No optimizer, unless a method has one."""
        return None

    @property
    def strict_loading(self) -> bool:
        """Checkpoints hold what was learned, which may be less than the module's state."""
        return False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        """Lightning sets it when a checkpoint is loaded; what it says does not matter."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what loading through the command line and through Python needs."""
        settings = checkpoint.setdefault("hyper_parameters", {})
        settings.setdefault("_class_path", f"{type(self).__module__}.{type(self).__qualname__}")
        settings.setdefault("_instantiator", "lightning.pytorch.cli.instantiate_module")
        checkpoint["base_model"] = {
            "name": self.base.name,
            "fingerprint": self.base.fingerprint,
            "tokenizer_fingerprint": self.base.tokenizer_fingerprint,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Warn when the checkpoint was fitted on another base model."""
        made = checkpoint.get("base_model")
        if not made:
            return
        for field in ("fingerprint", "tokenizer_fingerprint"):
            if made[field] != getattr(self.base, field):
                warnings.warn(
                    f"the checkpoint was fitted on base model '{made['name']}', and its {field} "
                    f"differs from that of '{self.base.name}'; expect poor edits",
                    stacklevel=2,
                )


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as JSON would hold them, so that a saved and a fresh edit compare equal."""
    result: dict[str, Any] = json.loads(json.dumps(values, sort_keys=True, default=str))
    return result
