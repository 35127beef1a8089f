"""The ``kedit`` command.

Help and version answer at once: what parses options is imported when there is something to parse.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from importlib import import_module
from typing import Any

from kedit_lightning import __version__
from kedit_lightning.errors import KEditError

HELP = """\
usage: kedit <command> [options]

Knowledge editing of language models: change what a model says about a fact, see what else the
change did, and undo it. The weights of the model are never written to.

commands:
  fit       learn once what later edits share: a hypernetwork, or statistics of keys
  edit      compute edits for requests, show answers before and after, and save the edits
  test      run a benchmark under a protocol, and report scores with confidence intervals
  validate  the same on the validation split
  predict   answer prompts with and without saved edits

options:
  -h, --help      show this; `kedit <command> --help` shows what a command takes,
                  `kedit <command> --model.help ROME` what a method takes
  --version       show the version
  -c NAME         a config: a file, or a packaged one such as methods/rome; several compose, and
                  options behind it override it

examples:
  kedit edit -c methods/rome --model.base_model nano --data Requests \\
      --data.prompt "The Eiffel Tower is in the city of" --data.subject "Eiffel Tower" \\
      --data.target_new Rome --output run/
  kedit predict -c methods/rome --model.base_model nano --edits run/ \\
      --prompt "The Eiffel Tower stands in"
  kedit test -c methods/memit -c data/counterfact --model.base_model gpt2-xl \\
      --trainer.protocol.mode sequential --trainer.protocol.chunk_size 100 --output scores/
  kedit test --resume scores/
"""

#: Messages of other libraries that tell a user nothing.
_NOISE = (
    ".*LeafSpec.* is deprecated",
    "The '.*_dataloader' does not have many workers",
    ".LightningModule.configure_optimizers. returned .None.",
    "Found .* in eval mode at the start of training",
    "The dirpath has changed",
)
_CHATTY = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")


def main(args: Any = None, run: bool = True) -> Any:
    """Run the command line.

    An error that the user can put right becomes one sentence and exit code 2; a bug of ours keeps
    its traceback.

    Args:
        args: Arguments instead of those of the process: a list, or a dictionary.
        run: Run the subcommand; without, there is none, and objects are only built.

    Returns:
        The command line object, with ``model``, ``datamodule`` and ``trainer``, if arguments were
        given; ``None`` for the process, whose exit code it becomes.
    """
    given = sys.argv[1:] if args is None else args
    if run and given in ([], ["-h"], ["--help"]):
        sys.stdout.write(HELP)
        raise SystemExit(0 if given else 2)
    if given == ["--version"]:
        sys.stdout.write(f"kedit {__version__}\n")
        raise SystemExit(0)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if args is None and not sys.stderr.isatty():
        # Bars of loading weights, which a log would hold line by line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    command = import_module("kedit_lightning.cli.parser")
    if args is None:  # a process of our own; importing Lightning has set its own form
        warnings.formatwarning = _warning
    try:
        done = command.run_command_line(args, run)
    except Exception as error:
        found: KEditError | None = command.kedit_error(error)
        if found is None:
            raise
        said = [str(found), *getattr(found, "__notes__", ())]
        sys.stderr.write(f"error: {' '.join('; '.join(said).split())}\n")
        raise SystemExit(2) from error
    return None if args is None else done


def _warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as a user reads it, without the place in our code it comes from."""
    return f"warning: {message}\n"


def __getattr__(name: str) -> Any:
    """``KEditCLI`` is fetched when it is asked for."""
    if name == "KEditCLI":
        return import_module("kedit_lightning.cli.parser").KEditCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    main()
