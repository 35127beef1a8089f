"""What the tests of the datasets share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedit_lightning.data import EditDataModule, Requests
from kedit_lightning.errors import DataFileError


def write(path: Path, *records: Any) -> Path:
    """Write records, or raw lines, as JSON Lines."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def fact(**changes: Any) -> dict[str, Any]:
    """A record of one's own that fits, with some fields changed, or absent."""
    record = {"prompt": "Amber Falls lies in", "subject": "Amber Falls", "target_new": "Norway"}
    return {key: value for key, value in {**record, **changes}.items() if value != "absent"}


def complaint(path: Path, dataset: type[EditDataModule] = Requests) -> str:
    """What is said about a file that holds bad records."""
    with pytest.raises(DataFileError) as caught:
        dataset(path=path).examples()
    return str(caught.value)
