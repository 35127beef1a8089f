"""What a run says when it is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kedit_lightning.runs.output_folder import OutputFolder


@contextmanager
def interruptible(folder: OutputFolder | None, first: bool) -> Iterator[None]:
    """Inside, Ctrl-C ends the process with exit code 130, and a sentence of the ``first`` process.

    Args:
        folder: What keeps the results of the run, if anything does.
        first: Whether this is the first process of the run.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning makes a SystemExit of Ctrl-C.
        if not any(isinstance(e, KeyboardInterrupt) for e in (end, end.__context__)):
            raise
        if first:
            kept = "nothing is kept, as no output folder was named"
            sys.stderr.write(f"interrupted: {folder.state if folder else kept}\n")
        raise SystemExit(130) from end
