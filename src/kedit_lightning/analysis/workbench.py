"""A model at work: facts tried, written and undone, with what else each changes.

What a page or a notebook shows of it are plain tuples; all edits stand in a ledger.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from kedit_lightning.base_models import BaseModel
from kedit_lightning.edits import Edit
from kedit_lightning.edits.origin import TARGET_PROBABILITIES
from kedit_lightning.errors import KEditError, LedgerError, one_line
from kedit_lightning.methods.method import EditMethod
from kedit_lightning.methods.training.trained_method import TrainedMethod
from kedit_lightning.registry import entries
from kedit_lightning.requests import EditRequest
from kedit_lightning.runs import Ledger
from kedit_lightning.runs.ledger_answers import facts_hold
from kedit_lightning.runs.ledger_lines import EditLine

#: What a request of one fact lacks, and the methods that are not about facts.
_LACKED = {"target_old", "task", "rephrases", "locality"}


class Answer(NamedTuple):
    """What a model answers to a prompt before and after a change."""

    prompt: str
    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether the two differ."""
        return self.before != self.after


class Trial(NamedTuple):
    """What a method makes of a fact.

    Args:
        method: Its name.
        answers: Answers to the fact's prompt, and to neighbours.
        holds: Whether each token of the wanted answer is the most likely one.
        seconds: How long the edit took to compute.
        notes: Warnings on the way.
        probability: Probability of the wanted answer under the edit.
        error: Why there is no edit; then there are no answers.
    """

    method: str
    answers: list[Answer]
    holds: bool
    seconds: float
    notes: list[str]
    probability: float | None = None
    error: str = ""

    @property
    def kept(self) -> tuple[int, int]:
        """How many neighbours kept their answer, and how many there are."""
        others = self.answers[1:]
        return sum(not answer.changed for answer in others), len(others)


class Entry(NamedTuple):
    """A line of the ledger, as a reader sees it."""

    number: int
    method: str
    prompt: str
    answer: str
    state: str


def method_names() -> list[str]:
    """Methods that write one fact from its prompt, subject and new answer, without a fit."""
    found = []
    for name, entry in entries("method").items():
        kind = entry.load()
        if kind.writes_facts and not issubclass(kind, TrainedMethod) and not kind.needs & _LACKED:
            found.append(name)
    return found


class Workbench:
    """A base model, and a ledger of the edits on it.

    Between calls the model is bare; the edits that stand are applied while it is asked.

    Args:
        base: The base model, or its name.
        ledger: Folder of a ledger to go on with; a temporary one if not given.
        max_new_tokens: Longest answer.

    Raises:
        KEditError: There is no such model, or the ledger is another model's.
    """

    def __init__(
        self,
        base: BaseModel | str = "nano",
        ledger: str | Path | None = None,
        max_new_tokens: int = 16,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        #: Holds ledgers without a folder of their own, and copies to download.
        self.folder = Path(tempfile.mkdtemp(prefix="kedit-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.base = base if isinstance(base, BaseModel) else loaded(base)
        self.ledger = self._fresh()
        if ledger is not None:
            self.open(ledger)

    # ---- what is worked on

    def load(self, name: str, dtype: str = "auto") -> str:
        """Work on another base model, with an empty ledger."""
        self.base = loaded(name.strip(), dtype)
        self.ledger = self._fresh()
        return f"{self.base.name} is loaded; no edit stands"

    def open(self, folder: str | Path) -> str:
        """Go on with a ledger, on the base model that it is of.

        A folder that does not exist yet is made by the first edit.

        Raises:
            LedgerError: A line is damaged.
            BaseModelMismatchError: Its edits were made for a model that is another one now.
        """
        path = Path(str(folder).strip()).expanduser()
        if not str(folder).strip():
            raise LedgerError("name the folder of a ledger, as `kedit edit --ledger` writes it")
        if path.is_dir() and not (path / "ledger.jsonl").is_file() and any(path.iterdir()):
            raise LedgerError(f"{path} holds other files and no ledger.jsonl; name another folder")
        found = Ledger(path)
        known = next((x.base_model for x in found.lines if isinstance(x, EditLine)), None)
        base = self.base
        here = (base.name, str(base.dtype).removeprefix("torch."))
        if known is not None and (known.name, known.dtype) != here:
            base = loaded(known.name, known.dtype, known.revision)
        with found.applied(base):  # the edits are read, and compared with the model
            pass
        self.base, self.ledger = base, found
        count = len(found.standing)
        return f"{path} has {count} edit{'s' * (count != 1)} that stand{'s' * (count == 1)}"

    def _fresh(self) -> Ledger:
        return Ledger(Path(tempfile.mkdtemp(prefix="ledger-", dir=self.folder)) / "ledger")

    # ---- what is asked and written

    def ask(self, prompts: Sequence[str]) -> list[Answer]:
        """Answers of the unedited model, and of the model with all edits that stand."""
        asked = [prompt for prompt in prompts if prompt.strip()]
        before = self._answers(asked)
        with self.ledger.applied(self.base):
            return [Answer(*row) for row in zip(asked, before, self._answers(asked), strict=True)]

    def try_method(
        self, method: str, request: EditRequest, neighbours: Sequence[str] = ()
    ) -> Trial:
        """What a method makes of a fact, on top of the edits that stand; nothing is kept."""
        prompts = _asked(request, neighbours)
        with self.ledger.applied(self.base), _noted() as notes:
            before, start = self._answers(prompts), time.perf_counter()
            try:
                edit = method_of(method, self.base).edit([request])
                seconds = time.perf_counter() - start
                with self.base.edits.restored():
                    edit.apply()
                    after, holds = self._answers(prompts), facts_hold(self.base, [request])[0]
            except KEditError as error:
                seconds = time.perf_counter() - start
                return Trial(method, [], False, seconds, notes, error=one_line(error))
        answers = [Answer(*row) for row in zip(prompts, before, after, strict=True)]
        return Trial(method, answers, holds, seconds, notes, _probability(edit))

    def compare(
        self, methods: Sequence[str], request: EditRequest, neighbours: Sequence[str] = ()
    ) -> Iterator[Trial]:
        """The same with several methods, each alone."""
        for method in methods:
            yield self.try_method(method, request, neighbours)

    def write(self, method: str, request: EditRequest, neighbours: Sequence[str] = ()) -> Trial:
        """Write a fact into the ledger, on top of the edits that stand.

        Raises:
            KEditError: The method refuses it, or the fact stands already.
        """
        prompts = _asked(request, neighbours)
        with self.ledger.applied(self.base):
            before = self._answers(prompts)
        with _noted() as notes:
            start = time.perf_counter()
            line = self.ledger.append(method_of(method, self.base), [request])
            seconds = time.perf_counter() - start
        with self.ledger.applied(self.base):
            after, holds = self._answers(prompts), facts_hold(self.base, [request])[0]
        answers = [Answer(*row) for row in zip(prompts, before, after, strict=True)]
        edit = self.ledger.load(line.edit, self.base)
        return Trial(method, answers, holds, seconds, notes, _probability(edit))

    def undo(self) -> str:
        """Take the last edit that stands out of the ledger.

        Raises:
            LedgerError: None stands.
        """
        if not self.ledger.standing:
            raise LedgerError("no edit stands, so there is none to undo")
        number = max(self.ledger.standing)
        line = self.ledger.entry(number)
        self.ledger.revert(number, self.base)
        return f"line {number} is undone: {_facts(line)}"

    def entries(self) -> list[Entry]:
        """The edits of the ledger, in the order in which they were written."""
        standing = self.ledger.standing
        return [
            Entry(
                line.number,
                line.method,
                " | ".join(r.prompt for r in line.requests),
                " | ".join(r.target_new for r in line.requests),
                "stands" if line.number in standing else "reverted",
            )
            for line in self.ledger.lines
            if isinstance(line, EditLine)
        ]

    def check(self) -> str:
        """Ask all facts that stand again, in one sentence."""
        found = self.ledger.check(self.base)
        lost = [f"line {one.number} ({one.state})" for one in found if one.state != "holds"]
        held, count = len(found) - len(lost), len(found)
        said = f"{held} of {count} fact{'s hold' if count != 1 else ' holds'}"
        return f"{said}; not: {', '.join(lost)}" if lost else said

    def edit_file(self) -> Path:
        """A copy of the file of the last edit that stands, under a name that says what it is.

        Raises:
            LedgerError: None stands.
        """
        if not self.ledger.standing:
            raise LedgerError("no edit stands, so there is no file of one")
        number = max(self.ledger.standing)
        line, saved = self.ledger.entry(number), self.ledger.standing[number]
        copy = self.folder / f"edit-{number}-{line.method}.safetensors"
        shutil.copyfile(self.ledger.edit_path(saved.id), copy)
        return copy

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        if not prompts:
            return []
        texts = self.base.generate(list(prompts), self.max_new_tokens, stop_at_sentence=True)
        return [text.strip() for text in texts]


def loaded(name: str, dtype: str = "auto", revision: str | None = None) -> BaseModel:
    """A base model on the accelerator, where there is one."""
    base = BaseModel.load(name, dtype=dtype, revision=revision)
    return base.to("cuda") if torch.cuda.is_available() else base


def method_of(name: str, base: BaseModel) -> EditMethod:
    """A method with the settings of its packaged config, as ``kedit edit -c`` takes them."""
    entry = entries("method")[name]
    text = files("kedit_lightning.configs").joinpath(f"{entry.config}.yaml").read_text("utf-8")
    settings = dict(yaml.safe_load(text)["model"].get("init_args") or {})
    settings.pop("base_model", None)
    method: EditMethod = entry.load()(base_model=base, **settings)
    return method


def fact(prompt: str, subject: str, target: str) -> EditRequest:
    """A request of three texts of a form; a subject may be left out.

    Raises:
        InvalidRequestError: A text is empty, or the subject is not part of the prompt.
    """
    return EditRequest(prompt.rstrip(), target, subject.strip() or None)


def lines_of(text: str) -> list[str]:
    r"""The lines of a text that are not empty.

    >>> lines_of("Rome is in\n\n Paris is in ")
    ['Rome is in', 'Paris is in']
    """
    return [line.strip() for line in text.splitlines() if line.strip()]


def _asked(request: EditRequest, neighbours: Sequence[str]) -> list[str]:
    return [request.prompt, *(one for one in dict.fromkeys(neighbours) if one != request.prompt)]


def _facts(line: EditLine) -> str:
    return ", ".join(f"{r.prompt!r} -> {r.target_new!r}" for r in line.requests)


def _probability(edit: Edit) -> float | None:
    found = edit.origin.notes.get(TARGET_PROBABILITIES)
    return float(found[0]) if found else None


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Inside, warnings are gathered as sentences."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield notes
        notes += dict.fromkeys(
            " ".join(str(one.message).split())
            for one in caught
            # Whether a fact is written is told beside its probability.
            if type(one.message) is UserWarning
        )
