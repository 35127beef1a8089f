"""The process of ``peer.py`` that runs the incumbent's own algorithm, in its own environment.

It imports nothing of this package: its interpreter need not have it.  Where there is no GPU, what
the incumbent puts on one stays on the CPU.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Functions of torch that make tensors on a device.
_FACTORIES = ("arange", "empty", "eye", "full", "ones", "rand", "randn", "tensor", "zeros")


def keep_on_cpu(torch: Any) -> None:
    """Let devices that are GPUs mean the CPU."""

    def here(value: Any) -> Any:
        is_gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return torch.device("cpu") if is_gpu else value

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            return function(*map(here, args), **{k: here(v) for k, v in options.items()})

        return call

    for owner in (torch.Tensor, torch.nn.Module):
        owner.to = kept(owner.to)
        owner.cuda = lambda self, *_, **__: self
    for name in _FACTORIES:
        setattr(torch, name, kept(getattr(torch, name)))


def settings_class(package: Any, algorithm: str) -> Any:
    """The class of an algorithm's settings, whose names are written in several ways."""

    def plain(name: str) -> str:
        return re.sub("[^a-z0-9]", "", name.lower())

    known = {plain(name): value for name, value in vars(package).items()}
    return known[plain(f"{algorithm}HyperParams")]


def main() -> None:
    """Edit and score all facts once for each line of input, and answer with the seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the incumbent prints is no answer
    checkout, hparams, algorithm, facts = sys.argv[1:]
    sys.path.insert(0, checkout)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        keep_on_cpu(torch)
    import easyeditor

    editor = easyeditor.BaseEditor.from_hparams(
        settings_class(easyeditor, algorithm).from_hparams(hparams)
    )
    given = json.loads(Path(facts).read_text(encoding="utf-8"))

    def run() -> float:
        start = time.process_time()
        editor.edit(**given, sequential_edit=False, verbose=False)
        return time.process_time() - start

    run()  # what is done once in a process
    answers.write("ready\n")
    answers.flush()
    for _ in sys.stdin:
        answers.write(f"{json.dumps(run())}\n")
        answers.flush()


if __name__ == "__main__":
    main()
