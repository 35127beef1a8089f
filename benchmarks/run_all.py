r"""All benchmarks with short settings, in one report.

    python benchmarks/run_all.py
    python benchmarks/run_all.py --only growth methods --output outputs/benchmarks
    python benchmarks/run_all.py --again growth

Each script runs in a process of its own.  What it printed stands in the output folder, and is not
run again there unless ``--again`` names it; one that failed is.  A failure does not keep the others
from running.  ``report.md`` has a table with a line for each script, and below it what each
printed.  Scripts that compare with another version or program run where ``--against`` names one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Arguments of each script under which it takes minutes.
SHORT = {
    "detoxifying": ["--requests", "4"],
    "evaluation": ["--facts", "20"],
    "growth": ["--sizes", "1", "1000"],
    "help_time": ["kedit", "test", "--pairs", "3"],
    "hypernetworks": [],
    "interval_coverage": ["--samples", "200"],
    "key_statistics": [],
    "ledger_growth": ["--count", "500"],
    "locate": ["--repeats", "1", "--vocabularies", "3000"],
    "long_answers": ["--models", "phrases"],
    "methods": ["--methods", "FTM", "ROME", "MEMIT", "GRACE", "--edits", "1"],
    "mixture": ["--limit", "4"],
    "pictures": ["--limit", "4", "--only", "FTM", "IKE"],
    "scores": ["--methods", "ROME", "MEMIT", "FTM", "GRACE", "--limit", "10"],
    "two_hop": ["--limit", "10"],
}
#: The same of scripts that compare with the version in a folder, which comes behind.
COMPARING = {
    "end_to_end": ["--facts", "4", "--repeats", "1", "--models", "nano", "--against"],
    "inner_loops": ["--facts", "4", "--against"],
}
PACKAGES = ("torch", "transformers", "lightning", "kedit_lightning")


@dataclass(frozen=True)
class Outcome:
    """How a script went: its command, exit code, processor seconds, and when it ended."""

    name: str
    command: str
    code: int
    seconds: float
    ended: str

    @property
    def row(self) -> str:
        """Its line of the table."""
        said = "done" if self.code == 0 else f"failed ({self.code})"
        return f"| {self.name} | `{self.command}` | {said} | {self.seconds:.0f} | {self.ended} |"


def measured(name: str, arguments: list[str], output: Path) -> Outcome:
    """Run a script, and keep what it prints and how it went."""
    command = ["benchmarks/" + f"{name}.py", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (output / f"{name}.txt").open("w", encoding="utf-8") as printed:
        script = [sys.executable, str(HERE / f"{name}.py"), *arguments]
        code = subprocess.run(script, stdout=printed, stderr=subprocess.STDOUT, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ended = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    outcome = Outcome(name, f"python {shlex.join(command)}", code.returncode, seconds, ended)
    (output / f"{name}.json").write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return outcome


def known(output: Path) -> dict[str, Outcome]:
    """Outcomes that an output folder has."""
    files = sorted(path for path in output.glob("*.json"))
    found = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return {outcome.name: outcome for outcome in found}


def report(output: Path) -> str:
    """The table of all outcomes, and what the scripts printed."""
    outcomes = known(output).values()
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    system = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    lines = [
        f"# Benchmarks, {max((outcome.ended for outcome in outcomes), default='none yet')}",
        "",
        f"Python {platform.python_version()}, {packages}; {system}.",
        "",
        "| benchmark | command | outcome | processor seconds | ended |",
        "|---|---|---|---|---|",
        *(outcome.row for outcome in outcomes),
    ]
    for outcome in outcomes:
        printed = (output / f"{outcome.name}.txt").read_text(encoding="utf-8").rstrip()
        lines += ["", f"## {outcome.name}", "", printed]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run what is to be run, and write the report after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SHORT, *COMPARING]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="these alone")
    parser.add_argument(
        "--again", nargs="+", default=[], choices=names, metavar="NAME", help="also if done"
    )
    parser.add_argument("--against", type=Path, help="folder of an earlier version")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = dict(SHORT)
    if options.against:
        settings |= {name: [*begin, str(options.against)] for name, begin in COMPARING.items()}
    failed = []
    for name in options.only or settings:
        if name not in settings:
            parser.error(f"{name} needs --against, the folder of an earlier version")
        done = known(options.output).get(name)
        if done is None or done.code or name in options.again:
            done = measured(name, settings[name], options.output)
        print(done.row, flush=True)
        failed += [name] if done.code else []
        (options.output / "report.md").write_text(report(options.output), encoding="utf-8")
    print(f"{options.output / 'report.md'} is written")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
