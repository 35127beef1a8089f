"""What is checked of a run's data before the first edit is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kedit_lightning.base_models import BaseModel
from kedit_lightning.benchmark import Protocol as Grouping
from kedit_lightning.benchmark import RunContext
from kedit_lightning.contradictions import overwritten, settle
from kedit_lightning.data.datamodule import EditDataModule, Split
from kedit_lightning.errors import UnsupportedUseError, article_list
from kedit_lightning.image_reference import references
from kedit_lightning.methods.shared.row_lengths import RowText, Window, too_long
from kedit_lightning.methods.shared.sequence_capacity import warn_of_capacity
from kedit_lightning.requests import EditExample, EditRequest, Probe

_SPLITS: dict[str, Split] = {"fit": "train", "validate": "validation"}


class DataUser(Protocol):
    """The part of an editing method that says what its data must be like."""

    run: RunContext

    @property
    def base(self) -> BaseModel:
        """The base model, loaded when first asked for."""

    @property
    def can(self) -> Any:
        """Whether it writes facts in ``batch``, and keeps earlier edits (``sequential``)."""

    def examples_to_fit(self, examples: Sequence[EditExample]) -> list[EditExample]:
        """The examples that ``fit`` learns from."""

    def check_examples(self, examples: Sequence[EditExample], fitting: bool = False) -> None:
        """Refuse examples that lack what it needs."""

    def too_long(self, examples: Sequence[EditExample]) -> dict[str, str]:
        """The examples that do not fit into the base model's window: why, by id."""


def refuse_images(name: str, items: Sequence[EditRequest | Probe], images: bool) -> None:
    """Refuse requests and probes about a picture for a method that reads none.

    Raises:
        UnsupportedUseError: One of them has an image.
    """
    seen = [item.label for item in items if item.image is not None]
    if seen and not images:
        raise UnsupportedUseError(
            f"{name} reads text only, and field 'image' is set in {article_list(seen)}; leave the "
            "field out, or choose a method that reads pictures, such as FTM"
        )


def set_up_data(method: DataUser, data: EditDataModule, stage: str) -> None:
    """Settle how the data of a run is grouped, and check it: needs first, lengths last.

    Needs are checked before the base model is loaded, which lengths need.

    Raises:
        InvalidRequestError: Requests contradict each other, and the protocol refuses that.
        MissingNeedsError: An example lacks something the method needs.
        UnsupportedUseError: A request or a probe has an image.
        DataFileError: Examples are too long, and ``on_bad_record`` is ``error``.
    """
    split, fits = _SPLITS.get(stage, "test"), stage == "fit"
    examples = data.examples(split)
    if fits:
        examples = method.examples_to_fit(examples)
    asked = method.run.protocol
    protocol = _grouped(method, data, asked, len(examples))
    refuse_images(
        type(method).__name__,
        [r for e in examples for r in e.requests + e.probes],
        method.can.images,
    )
    method.check_examples(examples, fitting=fits)
    if not fits and data.on_bad_record == "error":  # no record is left out: known before loading
        _refuse_conflicts(protocol, examples)
    data.leave_out(split, _unanswerable(method, examples, stage))
    examples = data.examples(split)
    protocol = _grouped(method, data, asked, len(examples))
    if not fits:
        _refuse_conflicts(protocol, examples)
    if method.run.editing and protocol.grouping != "single":
        left_out = overwritten(examples) | frozenset(method.run.left_out)
        method.run = replace(method.run, left_out=left_out)
    if stage == "test" and protocol.grouping != "single":
        _warn_of_length(method, protocol, sum(len(example.requests) for example in examples))
    if fits and "validation" in data.source:
        data.leave_out("validation", method.too_long(data.examples("validation")))


def _warn_of_length(method: DataUser, protocol: Grouping, facts: int) -> None:
    """Warn of a sequence, on top of the edits that stand, which the method does not carry."""
    standing = sum(len(edit.origin.requests) for edit in method.base.edits)
    if standing or protocol.grouping == "sequential":
        warn_of_capacity(type(method).__name__, standing + facts)


def _refuse_conflicts(protocol: Grouping, examples: Sequence[EditExample]) -> None:
    if protocol.on_conflict == "refuse":
        for requests in protocol.written_together(examples):
            settle(requests, "refuse")


def _grouped(method: DataUser, data: EditDataModule, asked: Grouping, examples: int) -> Grouping:
    """Group the examples of a run as its protocol says, or as is best where they are for use."""
    protocol, can = asked, method.can
    if method.run.editing:
        protocol = protocol.for_editing(can.batch, can.sequential, examples)
        method.run = replace(method.run, protocol=protocol)
    data.chunk_size = protocol.read_together
    data.order = protocol.order
    data.deals_out_chunks = protocol.grouping != "sequential"
    return protocol


def _unanswerable(
    method: DataUser, examples: Sequence[EditExample], stage: str
) -> Mapping[str, str]:
    """The examples that are too long for what a stage asks of them: why, by id."""
    if stage != "predict":
        return method.too_long(examples)
    prompts = [
        [RowText("its prompt", r.prompt, None, references(r.image)) for r in e.requests]
        for e in examples
    ]
    return too_long(Window.of(method.base), examples, prompts)
