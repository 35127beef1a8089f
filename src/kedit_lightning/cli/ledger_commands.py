"""``kedit log``, ``show``, ``revert``, ``replay``, ``blame``, ``diff``, ``check``, ``export``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from kedit_lightning.base_models import BaseModel
from kedit_lightning.cli.messages import UsageError, UsageParser
from kedit_lightning.errors import LedgerError, article_list
from kedit_lightning.requests import EditRequest
from kedit_lightning.runs import Ledger, export_edits
from kedit_lightning.runs.ledger_lines import EditLine, Later, Line
from kedit_lightning.runs.model_export import Export

#: Changes of the log-probability of an answer below this are rounding to a reader.
_TOUCH = 0.01
_BASE = " [--base_model MODEL] [--dtype DTYPE]"


def log_lines(arguments: Sequence[str]) -> str:
    """Text of ``kedit log DIR``: all lines, and what became of each."""
    ledger, _ = _read(arguments, "kedit log DIR", [])
    text = "".join(f"{_headline(ledger, line)}\n" for line in ledger.lines)
    facts = len(ledger.requests)
    edits = len(ledger.standing)
    return f"{text}{_count(edits, 'edit')} of {_count(facts, 'fact')} {_verb(edits, 'stand')}\n"


def show_line(arguments: Sequence[str]) -> str:
    """Text of ``kedit show DIR ID``: all that a line says."""
    ledger, given = _read(arguments, "kedit show DIR ID", ["line"])
    values = ledger.show(given.line).to_json()
    if isinstance(values.get("requests"), list):
        requests = values["requests"]
        values["requests"] = [{k: v for k, v in r.items() if v is not None} for r in requests]
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, width=100)


def revert_line(arguments: Sequence[str]) -> str:
    """Text of ``kedit revert DIR ID``: takes an edit out, and solves or computes later ones."""
    usage = f"kedit revert DIR ID [--replay | --keep_later]{_BASE}"
    ledger, given = _read(arguments, usage, ["line"], keep_later=False, replay=False)
    if given.keep_later and given.replay:
        raise LedgerError("--replay computes later edits again, --keep_later keeps them: give one")
    number = ledger.entry(given.line).number
    asked: Later | None = "keep" if given.keep_later else "replay" if given.replay else None
    line = ledger.revert(number, _base(ledger, given), asked)
    text = f"line {number} is reverted, by line {line.number}"
    if line.edits and line.later == "solve":
        text += f"; solved again without it: {_named(list(map(int, line.edits)))}"
        text += " (keys and wanted outputs were kept; --replay computes all of it again)"
    elif line.edits:
        text += f"; computed again without it: {_named(list(map(int, line.edits)))}"
    elif given.keep_later:
        text += "; later edits were kept as they are"
    edits = len(ledger.standing)
    return f"{text}\n{_count(edits, 'edit')} {_verb(edits, 'stand')}\n"


def replay_lines(arguments: Sequence[str]) -> str:
    """Text of ``kedit replay DIR``: computes all edits again, and compares them."""
    usage = f"kedit replay DIR [--drop ID]... [--output DIR]{_BASE}"
    ledger, given = _read(arguments, usage, [], drop=[], output=None)
    replayed = ledger.replay(_base(ledger, given), given.drop)
    equal = sum(one.equal for one in replayed)
    text = f"{equal} of {_count(len(replayed), 'edit')} equal those of the ledger bit for bit\n"
    differing = [one.line.number for one in replayed if not one.equal]
    if differing:
        text += f"others: {_named(differing)}\n"
    if given.output is not None:
        ledger.copy(replayed, Path(given.output).expanduser())
        text += f"the new edits are a ledger in {given.output}\n"
    return text


def blame_edits(arguments: Sequence[str]) -> str:
    """Text of ``kedit blame DIR PROMPT``: the edits without which an answer would be another."""
    usage = f"kedit blame DIR PROMPT [--max_new_tokens N]{_BASE}"
    ledger, given = _read(arguments, usage, ["prompt"], max_new_tokens=20)
    found = ledger.blame(_base(ledger, given), given.prompt, given.max_new_tokens)
    text = f"answer: {found.answer.strip()!r} (base model: {found.unedited.strip()!r})\n"
    shown = [t for t in found.touches if abs(t.change) >= _TOUCH or t.without != found.answer]
    for touch in shown:
        text += f"line {touch.number}: {touch.change:+.2f} log-probability; without it "
        text += "the same\n" if touch.without == found.answer else f"{touch.without.strip()!r}\n"
        text += f"    {_facts(ledger.entry(touch.number).requests)}\n"
    others = len(found.touches) - len(shown)
    change = _verb(others, "change")
    return f"{text}{_count(others, 'other edit')} {change} it by less than {_TOUCH}\n"


def diff_states(arguments: Sequence[str]) -> str:
    """Text of ``kedit diff DIR A B``: what differs between the states after two lines."""
    ledger, given = _read(arguments, "kedit diff DIR A B", ["first", "second"])
    found = ledger.diff(given.first, given.second)
    text = ""
    for sign, numbers in (("+", found.added), ("-", found.removed), ("~", found.recomputed)):
        for number in numbers:
            line = ledger.show(number)
            facts = line.requests if isinstance(line, EditLine) else ()
            text += f"{sign} line {number}: {_facts(facts)}\n"
    return text or "the states are equal\n"


def check_ledger(arguments: Sequence[str]) -> str:
    """Text of ``kedit check DIR``: asks all facts that stand again."""
    ledger, given = _read(arguments, f"kedit check DIR{_BASE}", [])
    found = ledger.check(_base(ledger, given))
    words = {"overwritten": "overwritten by line", "lost": "lost with line"}
    text = ""
    for one in found:
        if one.state != "holds":
            became = f"{words[one.state]} {one.by}" if one.state in words else one.state
            text += f"line {one.number}: {_facts([one.request])}: {became}\n"
    wanted = [one for one in found if one.state != "overwritten"]
    holding = sum(one.holds for one in wanted)
    return f"{text}{holding} of {_count(len(wanted), 'fact')} {_verb(holding, 'hold')}\n"


def export_ledger(arguments: Sequence[str]) -> str:
    """Text of ``kedit export DIR FOLDER``: writes the edited model for other tools."""
    usage = f"kedit export DIR FOLDER [--adapter | --gguf_lora] [--rank N]{_BASE}"
    ledger, given = _read(arguments, usage, ["folder"], adapter=False, gguf_lora=False, rank=0)
    export: Export = "gguf-lora" if given.gguf_lora else "adapter" if given.adapter else "model"
    if (given.adapter and given.gguf_lora) or (given.rank and export == "model"):
        raise UsageError(
            "an export is one of the model, of --adapter and of --gguf_lora; --rank is for the two "
            "adapters"
        )
    base, folder = _base(ledger, given), Path(given.folder).expanduser()
    if folder.resolve().is_relative_to(ledger.path.resolve()):
        raise UsageError(f"{folder} lies in the ledger {ledger.path}; export to another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written to ({error.strerror}); name another folder"
        ) from error
    with ledger.applied(base) as edits:
        path = export_edits(base, edits, folder, export, given.rank or None)
    return f"{_count(len(edits), 'edit')} exported as {export} to {path}\n"


def _read(
    arguments: Sequence[str], usage: str, words: Sequence[str], **options: object
) -> tuple[Ledger, Namespace]:
    """The ledger that arguments name, and their values."""
    parser = UsageParser(usage)
    for word in ("ledger", *words):
        parser.add_argument(word)
    for name, default in {**options, "base_model": None, "dtype": None}.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", action="append", default=default)
        else:
            kind = int if isinstance(default, int) else str
            parser.add_argument(f"--{name}", default=default, type=kind)
    given = parser.parse_args(list(arguments))
    for name, default in options.items():
        least = 1 if default else 0
        if type(default) is int and getattr(given, name) < least:
            raise UsageError(f"--{name} must be at least {least}, got {getattr(given, name)}")
    if not given.ledger:
        raise UsageError(f"the name of the ledger is empty; usage: {usage}")
    ledger = Ledger(Path(given.ledger).expanduser())
    if not ledger.lines:
        raise LedgerError(
            f"there is no ledger in '{ledger.path}'; `kedit edit --ledger {ledger.path}` starts one"
        )
    return ledger, given


def _base(ledger: Ledger, given: Namespace) -> BaseModel:
    """The base model of a ledger, under another name if one is given."""
    known = next(line.base_model for line in ledger.lines if isinstance(line, EditLine))
    return BaseModel.load(
        given.base_model or known.name,
        dtype=given.dtype or known.dtype,
        revision=None if given.base_model else known.revision,
    )


def _headline(ledger: Ledger, line: Line) -> str:
    start = f"{line.number:>4} {line.id[:8]}"
    if not isinstance(line, EditLine):
        again = _named(list(map(int, line.edits)))
        how = "solved" if line.later == "solve" else "computed"
        note = f"; {how} again: {again}" if line.edits else ""
        return f"{start} revert of line {line.entry}{note}"
    gone = "" if line.number in ledger.standing else " (reverted)"
    return f"{start} {line.method}{gone} {_facts(line.requests)}"


def _facts(requests: Sequence[EditRequest]) -> str:
    return article_list([f"{r.prompt!r} -> {r.target_new!r}" for r in requests], 3)


def _named(numbers: list[int]) -> str:
    return f"line{'s' * (len(numbers) != 1)} {article_list(list(map(str, numbers)))}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _verb(number: int, word: str) -> str:
    """A verb of the present, as it goes with a number of things.

    >>> _verb(1, "stand"), _verb(2, "stand")
    ('stands', 'stand')
    """
    return f"{word}{'s' * (number == 1)}"


def _plain(value: object) -> object:
    """Tuples as lists and records as mappings, which YAML can write."""
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)  # type: ignore[call-overload]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
