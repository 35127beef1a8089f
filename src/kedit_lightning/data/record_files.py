"""Records of a JSON list, of JSON Lines and of CSV, read one after another.

Records are parsed by ``json`` and ``csv``, since ``datasets`` guesses a type for each column, and
the guess changes facts: of the answer "2011-05-04" it makes a timestamp, of "NA" nothing, of "007"
7.0. It also forgets the line of a record.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from kedit_lightning.data.records import Record, RepeatedKeys
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, article_list

#: First bytes of UTF-16 and UTF-32, which no record of could be read.
_WIDE = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")
#: Characters of a JSON list that are read at a time.
_CHUNK = 1 << 20
_BLANKS = re.compile(r"[ \t\n\r]*")


def read_records(path: Path, most: int | None = None) -> tuple[list[Record], str]:
    """Read a JSON list, JSON Lines or CSV file.

    JSON and JSON Lines are told apart by content, since published files of both kinds end in
    ``.json``. A file is never held in memory as a whole, unless it is one JSON object, or no JSON.

    Args:
        path: The file.
        most: Records after which it is read no further; a mistake behind them is not seen.

    Returns:
        The records in order, those that cannot be read included, and the SHA-256 of the file.

    Bytes that are not UTF-8 stay in the texts as halves of surrogate pairs, which the fields that
    hold them refuse.

    Raises:
        DataFileError: The file is absent, UTF-16, empty, or a JSON list with a syntax error.
    """
    if path.is_dir():
        raise DataFileError(f"'{path}' is a folder; name a JSON, JSONL or CSV file in it")
    if not path.is_file():
        raise DataFileNotFoundError(f"data file '{path}' does not exist (looked in {Path.cwd()})")
    with path.open("rb") as file:
        if file.read(4).startswith(_WIDE):
            raise DataFileError(f"{path.name} is not UTF-8 text but UTF-16; save it as UTF-8")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    parse = _csv_records if path.suffix.lower() in (".csv", ".tsv") else _json_records
    if not (records := list(islice(parse(path), most))):
        raise DataFileError(f"{path.name} holds no records; add one, or name another file")
    return records, sha256


def _opened(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def _whole(path: Path) -> str:
    with _opened(path) as file:
        return file.read()


# JSON ------------------------------------------------------------------------------------------


def _json_records(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        pieces = (piece.lstrip() for piece in iter(lambda: file.read(64), ""))
        beginning = next(filter(None, pieces), "")
    if beginning.startswith("["):
        yield from _list_records(path)
    elif beginning.startswith("{") and (text := _one_object(path)) is not None:
        yield Record(f"{path.name} line 1", _parsed(text))
    else:
        with path.open("rb") as file:
            # Not str.splitlines: it also breaks at characters that JSON allows inside a text.
            yield from json_lines(map(_decoded, file), path.name)


def _decoded(line: bytes) -> str:
    return line.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _one_object(path: Path) -> str | None:
    """The text of a file that is one object over several lines; JSON Lines fail at the second."""
    with path.open("rb") as file:
        line = next(text for raw in file if (text := _decoded(raw).strip()))
    return text if not _is_json(line) and _is_json(text := _whole(path)) else None


def _is_json(text: str) -> bool:
    try:
        _parsed(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines(lines: Iterable[str], name: str) -> Iterator[Record]:
    """The records of JSON Lines, those that cannot be parsed included; blank lines are skipped."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield Record(f"{name} line {number}", _parsed(line))
        except (ValueError, RecursionError) as error:
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
            yield Record(f"{name} line {number}", problem=f"is not valid JSON: {reason}")


class _Window:
    """The part of a file that is being parsed; it moves on and grows as parsing asks for more."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._size = file, _CHUNK
        self.text, self.place = "", 0

    def more(self) -> bool:
        """Take in more of the file, twice as much each time; false at its end."""
        read = self._file.read(self._size)
        self.text, self.place = self.text[self.place :] + read, 0
        self._size *= 2
        return bool(read)

    def take(self, end: int) -> None:
        """Go on at a place of the text."""
        self.place, self._size = end, _CHUNK

    def mark(self, start: int) -> int:
        """Place of the next character that is not blank, or the length of the text."""
        return _BLANKS.match(self.text, start).end()  # type: ignore[union-attr]


def _list_records(path: Path) -> Iterator[Record]:
    """The items of a JSON list, each parsed when it is asked for."""
    scan = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    count = 0
    with _opened(path) as file:
        window = _Window(file)
        while not window.text.lstrip() and window.more():
            pass
        window.take(window.text.index("[") + 1)
        while True:
            start = window.mark(window.place)
            closed = window.text[start : start + 1] == "]" and count == 0
            try:
                value, end = (None, start) if closed else scan(window.text, start)
            except (ValueError, RecursionError):
                end = -1
            after = window.mark(end) if end >= 0 else len(window.text)
            mark = window.text[after : after + 1]
            # What is cut off may be whole with more, and a number may go on behind the window.
            if not mark or mark not in ",]":
                if window.more():
                    continue
                break
            if not closed:
                yield Record(f"{path.name} index {count}", value)
                count += 1
            window.take(after + 1)
            if mark == ",":
                continue
            while window.mark(window.place) == len(window.text):
                window.take(len(window.text))
                if not window.more():
                    return
            break
    # The parser of whole texts says what is wrong, and where.
    for index, value in enumerate(_whole_list(path)[count:], count):
        yield Record(f"{path.name} index {index}", value)


def _whole_list(path: Path) -> list[Any]:
    text = _whole(path)
    body = text.lstrip()
    try:
        values: list[Any] = _parsed(body)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = error.lineno + text[: len(text) - len(body)].count("\n")
            reason = f"{error.msg.removesuffix(' at')} at line {line} column {error.colno}"
        raise DataFileError(
            f"{path.name} is not valid JSON: {reason}; correct it there, or write one object a "
            "line (JSON Lines), where bad lines can be skipped"
        ) from error
    return values


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    repeated = RepeatedKeys(values)
    counts = Counter(name for name, _ in pairs)
    repeated.repeated = [name for name, count in counts.items() if count > 1]
    return repeated


# Tables ----------------------------------------------------------------------------------------


def _csv_records(path: Path) -> Iterator[Record]:
    name = path.name
    with _opened(path) as file:
        head = file.readline()
        delimiter = max(",;\t", key=head.count)
        reader = csv.reader(chain([head], file), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = [cell.strip() for cell in next(reader, [])]
            if twice := [c for c, count in Counter(header).items() if c and count > 1]:
                raise DataFileError(
                    f"{name} line 1 has the column {article_list([repr(c) for c in twice])} twice; "
                    "keep one of them"
                )
            while True:
                line = reader.line_num + 1
                if (cells := next(reader, None)) is None:
                    return
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{name} line {line}"
                if len(cells) > len(header):
                    problem = (
                        f"has {len(cells)} cells under {len(header)} columns; "
                        "put texts that hold the separator in quotation marks"
                    )
                    yield Record(where, problem=problem)
                    continue
                # An empty cell is the only way a table has to say that a value is absent.
                row = {key: cell for key, cell in zip(header, cells, strict=False) if cell.strip()}
                yield Record(where, row)
        except csv.Error as error:
            raise DataFileError(f"{name} line {line} is not valid CSV: {error}") from error
