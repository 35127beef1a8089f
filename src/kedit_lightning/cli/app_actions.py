"""What the buttons of ``kedit app`` do, as functions of texts that give texts and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeAlias

from kedit_lightning.analysis.workbench import Answer, Trial, Workbench, fact, lines_of
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.errors import KEditError, one_line

Rows: TypeAlias = list[list[str]]

ANSWERS = ["prompt", "before", "after", ""]
LEDGER = ["line", "method", "prompt", "answer", "state"]
COMPARED = ["method", "answer", "written", "probability", "neighbours kept", "seconds", "notes"]


def in_one_sentence(action: Callable[..., str]) -> Callable[..., str]:
    """An action whose errors are its text."""

    @wraps(action)
    def acting(*given: Any) -> str:
        try:
            return action(*given)
        except Exception as error:
            return sentence_of(error)

    return acting


def sentence_of(error: Exception) -> str:
    """An error as a page shows it; what is not ours is named by its class."""
    text = one_line(error)
    return f"error: {text}" if isinstance(error, KEditError) else f"{type(error).__name__}: {text}"


class AppActions:
    """The actions of a page on one model, which all its windows share.

    Args:
        bench: The model at work.
    """

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    def state(self) -> str:
        """Model, ledger, and how many edits stand."""
        count = len(self.bench.ledger.standing)
        where = "a temporary ledger"
        if self.bench.folder not in self.bench.ledger.path.parents:
            where = f"ledger {self.bench.ledger.path}"
        return f"{self.bench.base.name}: {count} edit{'s' * (count != 1)} in {where}"

    def ledger(self) -> Rows:
        """The edits of the ledger, the last one first."""
        return [[str(part) for part in entry] for entry in reversed(self.bench.entries())]

    @in_one_sentence
    def load(self, name: str) -> str:
        """Load another base model."""
        if not name.strip():
            raise UsageError("name a model: nano, a folder, or a name on the Hugging Face hub")
        return self.bench.load(name)

    @in_one_sentence
    def open(self, folder: str) -> str:
        """Go on with the ledger of a folder."""
        return self.bench.open(folder)

    @in_one_sentence
    def undo(self) -> str:
        """Take the last edit out."""
        return self.bench.undo()

    @in_one_sentence
    def check(self) -> str:
        """Ask all facts again."""
        return self.bench.check() if self.bench.ledger.standing else "no edit stands"

    def ask(self, prompt: str, neighbours: str) -> tuple[str, Rows]:
        """Answers of the unedited model and of the edited one."""
        try:
            prompts = [prompt, *lines_of(neighbours)]
            if not any(one.strip() for one in prompts):
                raise UsageError("type a prompt, or neighbours, one a line")
            answers = self.bench.ask(prompts)
        except Exception as error:
            return sentence_of(error), []
        return "answers of the unedited model, and with all edits that stand", rows_of(answers)

    def write(
        self, prompt: str, subject: str, target: str, method: str, neighbours: str
    ) -> tuple[str, Rows]:
        """Write a fact, and show what it changed."""
        try:
            request = fact(prompt, subject, target)
            found = self.bench.write(method, request, lines_of(neighbours))
        except Exception as error:
            return sentence_of(error), []
        return told(found), rows_of(found.answers)

    def compare(
        self, prompt: str, subject: str, target: str, methods: Sequence[str], neighbours: str
    ) -> Iterator[tuple[str, Rows]]:
        """Try a fact with several methods, one row after another; nothing is kept."""
        rows: Rows = []
        try:
            request = fact(prompt, subject, target)
            if not methods:
                raise UsageError("choose methods to compare")
            yield f"computing {methods[0]}", rows
            for place, found in enumerate(
                self.bench.compare(methods, request, lines_of(neighbours)), start=1
            ):
                rows = [*rows, compared(found)]
                more = methods[place : place + 1]
                yield f"computing {more[0]}" if more else "compared; nothing was kept", rows
        except Exception as error:
            yield sentence_of(error), rows

    def download(self) -> tuple[str, str | None]:
        """The file of the last edit."""
        try:
            path = self.bench.edit_file()
        except Exception as error:
            return sentence_of(error), None
        return f"{path.name} can be applied with `kedit predict --edits`", str(path)


def rows_of(answers: Sequence[Answer]) -> Rows:
    """Answers as rows of a table."""
    return [[a.prompt, a.before, a.after, "changed" if a.changed else "same"] for a in answers]


def told(found: Trial) -> str:
    """What became of a fact that was written, in a sentence."""
    kept, of = found.kept
    sure = (
        "" if found.probability is None else f" (probability of its answer {found.probability:.2f})"
    )
    said = f"the fact is written by {found.method} in {found.seconds:.1f} s{sure}"
    if not found.holds:
        said = (
            f"the fact did NOT take{sure}: its answer is not the likeliest one under the edit by "
            f"{found.method}; undo it, and try another method"
        )
    if of:
        said += f"; {kept} of {of} neighbours kept their answer"
    return "; ".join([said, *found.notes])


def compared(found: Trial) -> list[str]:
    """What a method made of a fact, as a row of a table."""
    if found.error:
        return [found.method, "", "no", "", "", f"{found.seconds:.1f}", found.error]
    kept, of = found.kept
    return [
        found.method,
        found.answers[0].after,
        "yes" if found.holds else "no",
        "" if found.probability is None else f"{found.probability:.2f}",
        f"{kept} of {of}",
        f"{found.seconds:.1f}",
        "; ".join(found.notes),
    ]
