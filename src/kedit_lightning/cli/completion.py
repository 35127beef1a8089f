"""Scripts by which a shell completes the options of the command."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import get_args

from jsonargparse import ArgumentParser, set_parsing_settings
from torch import Tensor

from kedit_lightning.cli.main import LISTS, REPORTS
from kedit_lightning.cli.messages import UsageError
from kedit_lightning.errors import MissingExtraError
from kedit_lightning.registry import Kind, entries

SHELLS = ("bash", "zsh", "fish")


def completion_script(parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """The script for the shell that ``kedit completion`` was given.

    It holds every option as text, so that completing one starts no Python, and our classes by their
    names alone.

    Raises:
        UsageError: No known shell was named.
        MissingExtraError: shtab, which writes the scripts, is absent.
    """
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UsageError(
            f"kedit completion takes the name of a shell: {', '.join(SHELLS)}; for bash: kedit "
            "completion bash > ~/.kedit-completion, and `source ~/.kedit-completion` in ~/.bashrc"
        )
    if find_spec("shtab") is None:
        raise MissingExtraError("completion is written by shtab: pip install shtab")
    # Libraries of quantised weights derive many classes from Tensor: to list what each takes, in
    # every option that may be a tensor, would take minutes.
    set_parsing_settings(subclasses_disabled=[Tensor])
    _add_other_commands(parser)
    script = str(parser.get_completion_script(f"shtab-{arguments[0]}"))
    names = "|".join(name for kind in get_args(Kind) for name in entries(kind))
    return re.sub(rf"\bkedit_lightning\.\w+\.({names})\b(?!\.)", r"\1", script)


def _add_other_commands(parser: ArgumentParser) -> None:
    """Let scripts know the commands that run nothing by name, with the files they take."""
    commands = next(action for action in parser._actions if hasattr(action, "add_subcommand"))
    for name in sorted([*REPORTS, *LISTS, "completion"]):
        other = ArgumentParser(description=f"See `kedit --help` for what {name} does.")
        if name in REPORTS:
            other.add_argument("path", nargs="*", type=os.PathLike)
        commands.add_subcommand(name, other)
