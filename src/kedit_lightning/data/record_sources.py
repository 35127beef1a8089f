"""Where records come from: a file, a folder of files, or a file of a dataset of the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path

import huggingface_hub

from kedit_lightning.data.record_files import read_records
from kedit_lightning.data.records import Record
from kedit_lightning.errors import DataFileError, DataFileNotFoundError

#: Files of a folder that hold records.
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
_FORM = "hf://datasets/OWNER/NAME@REVISION/FILE"


def read_source(path: Path, most: int | None = None) -> tuple[list[Record], str]:
    """The records of a file, of all files of a folder by name, or of a file of the hub.

    Args:
        path: The file or folder.
        most: Records after which nothing more is read.

    Returns:
        The records in order and the SHA-256 of what was read.

    Raises:
        DataFileError: The file or folder is absent, or cannot be read.
    """
    if path.parts[:1] == ("hf:",):
        return read_records(_from_hub(path), most)
    if not path.is_dir():
        return read_records(path, most)
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataFileError(
            f"'{path}' is a folder without JSON, JSONL or CSV files; name a file, or a folder with "
            "some"
        )
    records: list[Record] = []
    digest = hashlib.sha256()
    for file in files:
        found, sha256 = read_records(file, most)
        records += found
        digest.update(f"{file.name} {sha256}\n".encode())
    return records[:most], digest.hexdigest()


def _from_hub(path: Path) -> Path:
    """The local copy of a file of a dataset, at the revision that its address pins.

    The file itself is fetched, and read like every other: a typed table would change facts (see
    :mod:`kedit_lightning.data.records`).
    """
    _, kind, *rest = path.parts
    owner, _, revision = "/".join(rest[:2]).partition("@")
    if kind != "datasets" or len(rest) < 3 or not revision:
        raise DataFileError(
            f"'{path}' names no file of the hub at a pinned revision; write it as {_FORM}, where "
            "REVISION is a commit or a tag, so that a run can be repeated"
        )
    try:
        name = "/".join(rest[2:])
        found = huggingface_hub.hf_hub_download(owner, name, repo_type="dataset", revision=revision)
        return Path(found)
    except Exception as error:  # the library and what it is built on raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataFileNotFoundError(
            f"'{path}' cannot be read from the hub: {reason}; check the address, or give a file"
        ) from error
