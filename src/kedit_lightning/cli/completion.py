"""Scripts by which a shell completes the options of the command."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from jsonargparse import ArgumentParser

from kedit_lightning.cli.messages import UsageError
from kedit_lightning.errors import MissingExtraError

SHELLS = ("bash", "zsh", "fish")


def completion_script(parser: ArgumentParser, arguments: Sequence[str]) -> str:
    """The script for the shell that ``kedit completion`` was given.

    It holds every option as text, so that completing one starts no Python.

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
    return str(parser.get_completion_script(f"shtab-{arguments[0]}"))
