"""``kedit convert``: EasyEdit's settings and lists of requests, in the form they have here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.cli.config_arguments import read_yaml
from kedit_lightning.cli.easyedit.hparams_file import hparams_conversion, unknown_keys
from kedit_lightning.cli.easyedit.request_lists import converted_requests, is_request_list
from kedit_lightning.cli.messages import UsageError, UsageParser
from kedit_lightning.errors import DataFileError, DataFileNotFoundError

USAGE = "kedit convert FILE [--output FILE] [--method NAME] [--skip_unknown]"


def run_conversion(arguments: Sequence[str]) -> str:
    """Text of ``kedit convert``: a config from ``hparams``, or facts from a list of requests.

    With ``--output`` it is written there, and what differs is said.

    Raises:
        UsageError: The arguments do not fit, or a key is unknown.
        DataFileError: The file cannot be read, or that of ``--output`` exists.
    """
    parser = UsageParser(USAGE)
    parser.add_argument("file")
    parser.add_argument("--output")
    parser.add_argument("--method")
    parser.add_argument("--skip_unknown", action="store_true")
    given = parser.parse_args(list(arguments))
    source = Path(given.file).expanduser()
    values = _read(source)
    target = None if given.output is None else Path(given.output).expanduser()
    if target is not None and target.exists():
        raise DataFileError(f"'{target}' exists; remove it, or name another file")
    if is_request_list(values):
        facts = converted_requests(values)
        text = json.dumps(facts, ensure_ascii=False, indent=2) + "\n"
        said = f"{len(facts)} fact{'s' * (len(facts) != 1)}, as --data Requests reads them\n"
    elif isinstance(values, dict):
        found = hparams_conversion(values, given.method)
        if found.unknown and not given.skip_unknown:
            raise UsageError(
                f"{source}: {unknown_keys(found)}; correct them, or leave them out with "
                "--skip_unknown"
            )
        text = found.text(str(given.file), str(given.output or "config.yaml"))
        said = f"{found.method.method} with {len(found.settings)} settings; see its head\n"
        said += "".join(f"differs: {key}: {reason}\n" for key, reason in found.differs.items())
        said += f"left out: {', '.join(found.unknown)}\n" if found.unknown else ""
    else:
        raise DataFileError(
            f"'{source}' holds neither settings of EasyEdit nor a list of requests with prompt and "
            "target_new"
        )
    if target is None:
        return text
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return f"{target}: {said}"


def _read(source: Path) -> Any:
    """Values of a YAML or JSON file."""
    if not source.is_file():
        raise DataFileNotFoundError(
            f"there is no file '{source}'; correct the path of the file of EasyEdit"
        )
    if source.suffix != ".json":
        return read_yaml(source, "file")
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataFileError(f"file '{source}' is no JSON: {error}") from error
