"""Processor time of ``kedit --help`` and of its commands beside that of ``import torch``, in pairs.

    python benchmarks/help_time.py                 all of them, seven pairs each
    python benchmarks/help_time.py test --pairs 15
    python benchmarks/help_time.py test --cold     an empty cache before each run

Each pair runs both in processes of their own, one after the other, and takes user and system time
of the whole process. The ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping

COMMANDS = ("kedit", "fit", "edit", "test", "validate", "predict")
#: The largest ratio that help of a command may take, and that of ``kedit`` itself.
LIMIT, OWN_LIMIT = 1.5, 0.2


def processor_seconds(arguments: list[str], environment: Mapping[str, str]) -> float:
    """User and system time of a Python process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="*", default=COMMANDS, help="see above")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs of each command")
    parser.add_argument("--cold", action="store_true", help="empty the cache before each run")
    args = parser.parse_args()
    print(
        "| command | import torch, s | --help, s | ratio (lowest to highest) |\n|---|---|---|---|"
    )
    for command in args.commands:
        pairs = []
        with tempfile.TemporaryDirectory() as warm:
            words = [] if command == "kedit" else [command]
            help_of = ["-m", "kedit_lightning", *words, "--help"]
            processor_seconds(help_of, {**os.environ, "KEDIT_CACHE": warm})
            for _ in range(args.pairs):
                torch_seconds = processor_seconds(["-c", "import torch"], os.environ)
                with tempfile.TemporaryDirectory() as empty:
                    cache = empty if args.cold else warm
                    seconds = processor_seconds(help_of, {**os.environ, "KEDIT_CACHE": cache})
                pairs.append((torch_seconds, seconds))
        ratios = [seconds / torch_seconds for torch_seconds, seconds in pairs]
        medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
        print(
            f"| {command} | {medians[0]:.2f} | {medians[1]:.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, at most {LIMIT if words else OWN_LIMIT}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
