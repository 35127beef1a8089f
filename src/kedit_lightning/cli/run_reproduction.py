"""``kedit reproduce``: a finished run again, compared number by number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from kedit_lightning.analysis.reproduction import Reproduction, reproduction
from kedit_lightning.cli.main import main
from kedit_lightning.cli.messages import UsageParser
from kedit_lightning.errors import DataFileNotFoundError, NotReproducedError, article_list
from kedit_lightning.runs.results import read_results

USAGE = "kedit reproduce RUN [--output DIR] [--tolerance 1e-5]"


def run_reproduction(arguments: Sequence[str]) -> str:
    """Repeat a run with its ``config.yaml``, and say whether all numbers are the same.

    The repeated run is written beside the first one, and continued if it was interrupted.

    Raises:
        UsageError: The arguments do not fit.
        DataFileNotFoundError: The folder holds no finished run.
        NotReproducedError: A number differs; the message says which, and what else differs.
    """
    parser = UsageParser(USAGE)
    parser.add_argument("run")
    parser.add_argument("--output")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    given = parser.parse_args(list(arguments))
    first = Path(given.run).expanduser()
    command = read_results(first)["command"]
    config = first / "config.yaml"
    if not config.is_file():
        raise DataFileNotFoundError(
            f"'{first}' has no config.yaml, so it was started from Python; run the same lines "
            "again with another output folder, and compare the two with `kedit compare`"
        )
    second = Path(given.output or f"{first.resolve()}-reproduced").expanduser()
    interrupted = (second / "run.json").is_file() and not (second / "results.json").is_file()
    resume = ["--resume", str(second)] if interrupted else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
        main([command, "--config", str(config), "--output", str(second), *resume])
    found = reproduction(first, second, given.tolerance)
    if not found.equal:
        raise NotReproducedError(f"{second} differs from {first}: {_told(found)}")
    text = f"{second} equals {first}: {found.readings:,} readings, and every score\n"
    if found.rounded:
        text += f"{found.rounded:,} of them by rounding alone, up to {found.largest['']:.2g}\n"
    if found.facts:
        text += f"the runs differ in {article_list(list(found.facts))}\n"
    return text


def _told(found: Reproduction) -> str:
    """What differs, in one sentence; the scores first."""
    clauses = [f"{key} {then:.6g} -> {now:.6g}" for key, then, now in found.scores]
    parts = [f"scores {article_list(clauses, 5)}"] if clauses else []
    if count := sum(found.differing.values()):
        names = [f"{n} of {name}{_by_up_to(found, name)}" for name, n in found.differing.items()]
        parts.append(f"{count:,} of {found.readings:,} readings, {article_list(names, 5)}")
    if found.missing:
        parts.append(f"records that one of them lacks, {article_list(list(found.missing), 5)}")
    if found.facts:
        parts.append(f"what may explain it: {article_list(list(found.facts), 5)}")
    else:
        parts.append("settings, data, model and versions are the same")
    return "; ".join(parts)


def _by_up_to(found: Reproduction, name: str) -> str:
    return f" by up to {found.largest[name]:.2g}" if name in found.largest else ""
