"""Edit requests, probes, and the examples and batches that hold them.

Everything here is text: tokens and pixels belong to :mod:`kedit_lightning.base_models`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from kedit_lightning.character_forms import differences, is_unicode, spans_of, trimmed
from kedit_lightning.chat_turns import Message, passage_with, prompt_text, question_in
from kedit_lightning.errors import InvalidRequestError, article_list
from kedit_lightning.image_reference import Image, ImageSource, references, settled
from kedit_lightning.probe_task import ProbeTask

ProbeKind: TypeAlias = Literal["rewrite", "rephrase", "locality", "portability"]
#: Fields that the first records of requests and probes did not have.
_NEWER = ("image", "constraint_prompt", "constraint_answer")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(trimmed(value))


def _refuse(record: str, field: str, reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"{record}: field '{field}' {reason}")


def _check_unicode(record: str, field: str, text: str) -> None:
    if not is_unicode(text):
        reason = f"holds {text!r}, a part of which is no character and cannot be written as UTF-8"
        raise _refuse(record, field, reason)


def _own_span(record: str, subject: str, prompt: str) -> str:
    """A subject as its prompt writes it, where that is another form of the same characters."""
    if subject in prompt:
        return subject
    found = spans_of(subject, prompt)
    if len(found) == 1:
        return found[0]
    reason = f"({subject!r}) does not occur in the prompt {prompt!r}"
    if len(found) > 1:
        reason += f", which has it in {len(found)} forms"
    if clause := differences(subject, prompt):
        reason += f"; {clause}"
    raise _refuse(record, "subject", f"{reason}; write it exactly as the prompt does")


def _keep(item: EditRequest | Probe, values: dict[str, Any]) -> None:
    """Put trimmed texts in the place of those that were given, and remember which changed."""
    changed = {name: value for name, value in values.items() if value != getattr(item, name)}
    if changed:
        for name, value in (*changed.items(), ("_trimmed", tuple(changed))):
            object.__setattr__(item, name, value)


def _settle(of: EditRequest | Probe) -> None:
    """Give messages and pictures their one spelling; no prompt at all is refused by its owner."""
    given: object = of.prompt
    if isinstance(given, (str, list, tuple)):
        object.__setattr__(of, "prompt", prompt_text(given))
    try:
        object.__setattr__(of, "image", settled(of.image))
    except InvalidRequestError as error:
        raise _refuse(of.label, "image", str(error)) from error
    for reference in references(of.image):
        _check_unicode(of.label, "image", reference)


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into a base model.

    White space at the edges of the subject and of both targets is dropped: the tokens it makes are
    none that a model says. A subject that the prompt has in another form (composed or not, full
    width, with other spaces) is taken as the prompt has it.

    Args:
        prompt: Text that ends where the answer begins; or messages, a list of ``role`` and
            ``content``, which become their JSON here and are put into the chat template later.
        target_new: The answer to write.
        subject: The span of ``prompt`` that the fact is about; some methods need it.
        target_old: The answer the fact had before, where known.
        id: Name of the request in reports and file names.
        task: Name of the kind of fact, such as a relation; some methods need it.
        image: The picture that the prompt is about, or a list of several, for vision-language
            models: a path, a URL, bytes or a Pillow image, which become a data URL here.
        constraint_prompt: A question whose answer the edit should leave as it is; some methods
            train against its change.
        constraint_answer: The answer to it.

    Raises:
        InvalidRequestError: A text is empty or not text, the subject is not part of the prompt, or
            a constraint lacks its question or its answer.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    target_old: str | None = None
    id: str | None = None
    task: str | None = None
    image: Image | None = None
    constraint_prompt: str | None = None
    constraint_answer: str | None = None

    if TYPE_CHECKING:  # the attribute is a text, whatever was given

        def __init__(
            self,
            prompt: str | Sequence[Message],
            target_new: str,
            subject: str | None = None,
            target_old: str | None = None,
            id: str | None = None,
            task: str | None = None,
            image: ImageSource | Sequence[ImageSource] | None = None,
            constraint_prompt: str | None = None,
            constraint_answer: str | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        _settle(self)
        for field, value in list(vars(self).items()):
            if field == "image":
                continue
            needed = field in ("prompt", "target_new")
            if (needed or value is not None) and not _is_text(value):
                rule = "must be text that is not empty" + (", or absent" if not needed else "")
                raise _refuse(self.label, field, f"{rule}, got {value!r}")
            if value is not None:
                _check_unicode(self.label, field, value)
        if (self.constraint_prompt is None) != (self.constraint_answer is None):
            lacking = "constraint_answer" if self.constraint_prompt else "constraint_prompt"
            raise _refuse(self.label, lacking, "is absent, and a constraint is a question with it")
        texts = ("target_new", "target_old", "subject", "constraint_answer")
        _keep(self, {name: trimmed(text) for name in texts if (text := getattr(self, name))})
        if self.subject is not None:
            asked = passage_with(self.prompt, self.subject)
            subject = _own_span(self.label, self.subject, asked)
            object.__setattr__(self, "subject", subject)

    @classmethod
    def recorded(cls, **values: Any) -> EditRequest:
        """A request as a file records it, with the white space that its edit was computed for."""
        request = cls(**values)
        for name in request.trimmed:
            object.__setattr__(request, name, values[name])
        return request

    @property
    def trimmed(self) -> tuple[str, ...]:
        """Fields at whose edges white space was dropped."""
        fields: tuple[str, ...] = vars(self).get("_trimmed", ())
        return fields

    @property
    def label(self) -> str:
        """How messages name this request."""
        return f"request {question_in(self.prompt) if self.id is None else self.id!r}"


@dataclass(frozen=True)
class Probe:
    """A question that judges an edit.

    White space at the edges of answers, of the contrast and of a rephrase is dropped; a rephrase
    keeps a line break at its end.

    Args:
        kind: What the answer tells: ``rewrite``, ``rephrase``, ``locality`` or ``portability``.
        prompt: Text that ends where the answer begins, or messages as in :class:`EditRequest`.
        answers: Answers that count as right, the preferred one first. May be empty for locality,
            which asks whether the base model's own answer has changed, and for a task that has no
            right answers.
        group: Name under which scores are collected, such as ``neighborhood``; the kind if empty.
        contrast: An answer that should be less likely than ``answers[0]`` after the edit.
        image: The picture that the prompt is about, or a list of several, for vision-language
            models: a path, a URL, bytes or a Pillow image, which become a data URL here.
        task: What a benchmark asks of it beside its answers.

    Raises:
        InvalidRequestError: The kind is unknown, a text is empty, or a needed answer is missing.
    """

    kind: ProbeKind
    prompt: str
    answers: tuple[str, ...] = ()
    group: str = ""
    contrast: str | None = None
    image: Image | None = None
    task: ProbeTask | None = None

    if TYPE_CHECKING:  # as above; lists become tuples

        def __init__(
            self,
            kind: ProbeKind,
            prompt: str | Sequence[Message],
            answers: Sequence[str] = (),
            group: str = "",
            contrast: str | None = None,
            image: ImageSource | Sequence[ImageSource] | None = None,
            task: ProbeTask | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        _settle(self)
        name = self.label
        if self.kind not in get_args(ProbeKind):
            raise _refuse(name, "kind", f"must be one of {', '.join(get_args(ProbeKind))}")
        if not _is_text(self.prompt):
            raise _refuse(name, "prompt", f"must be text that is not empty, got {self.prompt!r}")
        if not isinstance(self.group, str):
            raise _refuse(name, "group", f"must be text, got {self.group!r}")
        if isinstance(self.answers, str):
            raise _refuse(name, "answers", f"must be a list of texts, got {self.answers!r}")
        # Lists arrive from JSON; a tuple keeps the probe hashable.
        object.__setattr__(self, "answers", tuple(self.answers))
        asked = self.task is None or self.task.has_answers
        if not self.answers and self.kind != "locality" and asked:
            raise _refuse(name, "answers", "must hold at least one answer")
        texts = [("answers", answer) for answer in self.answers]
        texts += [("contrast", self.contrast)] if self.contrast is not None else []
        for field, text in texts:
            if not _is_text(text):
                raise _refuse(name, field, f"must hold text that is not empty, got {text!r}")
        for field, text in (("prompt", self.prompt), ("group", self.group), *texts):
            _check_unicode(name, field, text)
        kept: dict[str, Any] = {"answers": tuple(trimmed(answer) for answer in self.answers)}
        if self.contrast is not None:
            kept["contrast"] = trimmed(self.contrast)
        if self.kind == "rephrase":
            kept["prompt"] = trimmed(self.prompt, keep_line_end=True)
        _keep(self, kept)
        if not self.group:
            object.__setattr__(self, "group", self.kind)

    @property
    def trimmed(self) -> tuple[str, ...]:
        """Fields at whose edges white space was dropped."""
        fields: tuple[str, ...] = vars(self).get("_trimmed", ())
        return fields

    @property
    def label(self) -> str:
        """How messages name this probe."""
        return f"{self.kind} probe {question_in(self.prompt)!r}"


@dataclass(frozen=True)
class EditExample:
    """One record of a benchmark: requests written together, and the probes that judge them."""

    requests: tuple[EditRequest, ...]  # the facts to write
    probes: tuple[Probe, ...]  # the questions asked before and after
    id: str  # name of the record in results

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", tuple(self.requests))
        object.__setattr__(self, "probes", tuple(self.probes))
        if not self.requests:
            raise _refuse(f"example {self.id!r}", "requests", "must hold at least one request")

    @classmethod
    def from_request(
        cls, request: EditRequest, id: str, probes: Sequence[Probe] = ()
    ) -> EditExample:
        """Pair a request with the rewrite probe that follows from it, and further probes."""
        answers, old = (request.target_new,), request.target_old
        rewrite = Probe("rewrite", request.prompt, answers, "", old, request.image)
        return cls((request,), (rewrite, *probes), id)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what newer fields lack is left out, so that hashes made without it stay."""
        values = asdict(self)
        for item in (*values["requests"], *values["probes"]):
            for name in _NEWER:
                if name in item and item[name] is None:
                    del item[name]
        for item, probe in zip(values["probes"], self.probes, strict=True):
            if probe.task is None:
                del item["task"]
            else:
                item["task"] = probe.task.to_json()
        return values


def trimmed_texts(items: Iterable[EditRequest | Probe]) -> str:
    """A clause that counts the texts that lost white space at their edges; empty if none did."""
    counts: Counter[str] = Counter()
    for item in items:
        whose = f" of {item.kind} probes" if isinstance(item, Probe) else ""
        counts.update(f"{field}{whose}" for field in item.trimmed)
    found = article_list([f"{field} ({count})" for field, count in counts.items()])
    return found and f"white space was dropped at the edges of {found}"


class EditBatch:
    """A batch of examples in Lightning's loops, as text.

    It is a plain class with a ``to`` method: Lightning moves and casts batches, and would walk into
    a dataclass or a collection and fail on the frozen dataclasses inside.
    """

    def __init__(self, examples: list[EditExample]) -> None:
        self.examples = examples

    @property
    def requests(self) -> list[EditRequest]:
        """All requests of the batch in order."""
        return [request for example in self.examples for request in example.requests]

    @property
    def prompts(self) -> list[str]:
        """The prompts of all requests in order."""
        return [request.prompt for request in self.requests]

    @property
    def images(self) -> list[Image | None]:
        """The pictures of all requests in order."""
        return [request.image for request in self.requests]

    def to(self, *args: Any, **kwargs: Any) -> EditBatch:
        """Return the batch itself; text has no device."""
        return self

    def __len__(self) -> int:
        return len(self.examples)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EditBatch) and self.examples == other.examples

    def __hash__(self) -> int:
        return hash(tuple(self.examples))

    def __repr__(self) -> str:
        return f"EditBatch({self.examples!r})"
