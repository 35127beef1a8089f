"""``kedit data``: what a file of facts holds, and whether it fits a model."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kedit_lightning.base_models.rows import RowEncoder
from kedit_lightning.base_models.spec import BaseModelSpec, load_tokenizer
from kedit_lightning.cli.messages import UsageError, UsageParser
from kedit_lightning.data import EditDataModule
from kedit_lightning.data.description import Description, described
from kedit_lightning.data.file_formats import recognised
from kedit_lightning.data.record_sources import read_source
from kedit_lightning.methods.shared.row_lengths import Window, example_rows, token_counts, too_long
from kedit_lightning.registry import entries

USAGE = "kedit data [NAME] PATH [--model MODEL] [--limit N]"


def data_report(arguments: Sequence[str]) -> str:
    """Text of ``kedit data``.

    Raises:
        UsageError: The arguments do not fit.
        DataFileError: The file cannot be read.
    """
    parser = UsageParser(USAGE)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int)
    given = parser.parse_args(list(arguments))
    *names, path = given.words
    if len(names) > 1:
        parser.error(f"too many words: {' '.join(given.words)}")
    cls = _dataset(names[0] if names else None, path)
    data = cls(path=path, limit=given.limit, on_bad_record="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        examples = data.examples()
    source = data.source["test"]
    sink = io.StringIO()
    console = Console(file=sink, width=100, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{path}: {len(examples)} examples, as {cls.__name__} reads them")
    console.print(f"SHA-256 {source['sha256']}")
    _print_counts(console, described(examples), source["skipped"])
    for warning in caught:
        console.print(f"note: {warning.message}")
    if given.model is not None:
        window = _window(given.model)
        rows = [example_rows(example) for example in examples]
        counts = token_counts(window, (row for own in rows for row in own))
        long = too_long(window, examples, rows)
        console.print(
            f"longest row: {max(counts.values())} tokens; {window.model} takes {window.tokens}"
        )
        for id, reason in long.items():
            console.print(f"too long: record {id}: {reason}")
    return sink.getvalue()


def _dataset(name: str | None, path: str) -> type[EditDataModule]:
    known = {n: e for n, e in entries("dataset").items() if n != "Texts"}
    if name is None:
        records, _ = read_source(Path(path).expanduser())
        found = recognised([record.values for record in records])
        name = (found.dataset if found is not None else None) or "Requests"
    if name not in known:
        raise UsageError(f"there is no dataset {name!r}; known are {', '.join(known)}")
    cls: type[EditDataModule] = known[name].load()
    return cls


def _window(name: str) -> Window:
    tokenizer, tokens = load_tokenizer(BaseModelSpec(name))
    return Window(f"base model '{name}'", RowEncoder(tokenizer), tokens)


def _print_counts(console: Console, found: Description, skipped: int) -> None:
    facts = {
        "facts to write": found.requests,
        "records left out": skipped,
        "facts without a subject": found.without_subject,
        "duplicates (same prompt and answer)": found.duplicates,
        "conflicts (same prompt, other answer)": found.conflicts,
    }
    for title, count in facts.items():
        console.print(f"{title}: {count}")
    for title, (least, middle, most) in found.characters.items():
        console.print(f"characters of {title}: {least} to {most}, median {middle}")
    table = Table("kind", "group", "probes", "in examples", "without answer")
    for one in found.probes:
        counts = (one.probes, one.examples, one.without_answer)
        table.add_row(one.kind, one.group, *map(str, counts))
    console.print(table)
