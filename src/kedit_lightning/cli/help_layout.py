"""What the help of a command shows first, and what only its full form shows."""

from __future__ import annotations

import inspect
import re
from argparse import SUPPRESS, Action
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from kedit_lightning.methods import EditMethod
from kedit_lightning.registry import Kind, entries
from kedit_lightning.trainer import EditTrainer

#: The option that also shows settings of Lightning's trainer.
FULL_HELP = "--help-all"
#: Settings of Lightning's trainer that a user of this package needs.
_NEEDED = ("accelerator", "max_epochs")
#: Groups of settings in the order of the help, with titles; those of the command stand third.
_TITLES = {
    "model": "The editing method",
    "data": "The data",
    "": "This command",
    "trainer.protocol": "How edits are applied and scored",
    "trainer": f"The trainer ({FULL_HELP} shows all settings of Lightning's)",
}
#: Base classes of what the registry names.
_BASES: dict[str, Kind] = {
    "kedit_lightning.methods.EditMethod": "method",
    "lightning.LightningDataModule": "dataset",
    "lightning.Callback": "callback",
}
_KNOWN = re.compile(r"known subclasses: ([\w., ]+)")


class FullHelp(Action):
    """Prints the help with all settings."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        kwargs |= {"nargs": 0, "default": SUPPRESS}
        super().__init__(option_strings, SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print it and leave."""
        parser.shows_all = True
        parser.print_help()
        parser.exit()


class ShortNames(DefaultHelpFormatter):
    """Names classes as a user would: by class name, without bases and internal ones."""

    def _get_help_string(self, action: Action) -> str:
        return _KNOWN.sub(_known_names, super()._get_help_string(action))


def _known_names(match: re.Match[str]) -> str:
    """The classes that are loaded, and by the registry those of a base that need not be."""
    paths = match[1].split(", ")
    ours = [name for path in paths if path in _BASES for name in entries(_BASES[path])]
    found = [path.rpartition(".")[2] for path in paths if _usable(path.split("."))]
    names = [name for name in dict.fromkeys(found) if name not in ours]
    return f"known: {', '.join([*names, *ours])}"


def _usable(path: list[str]) -> bool:
    """Whether a class is neither a base nor internal: those stand at the root, or deeper down."""
    if path[0] == "lightning":
        return len(path) > 2
    return path[0] != "kedit_lightning" or (len(path) < 4 and path[-1] != EditMethod.__name__)


def lay_out(parser: LightningArgumentParser, everything: bool) -> None:
    """Order the groups of a command's help, and hide settings of Lightning unless told not to."""
    groups: list[Any] = [*parser._action_groups]
    settings = dict[str, list[Any]]()
    for group in groups[2:]:
        first = group._group_actions[0].dest.removesuffix(".help") if group._group_actions else ""
        key = first if first in _TITLES else ""
        group.title = _TITLES[key]
        settings.setdefault(key, []).append(group)
    parser._action_groups = groups[:2] + [g for key in _TITLES for g in settings.get(key, ())]
    parser.usage = str(parser.prog).replace(" [options]", "") + " [options]"
    details = [*settings.get("trainer", ()), *settings.get("trainer.protocol", ())]
    for action in (action for group in details for action in group._group_actions):
        if not everything and action.dest.endswith(".help"):
            action.help = SUPPRESS
    shown = {*inspect.signature(EditTrainer).parameters, *_NEEDED}
    for group in settings.get("trainer", ()):
        for action in group._group_actions:
            if not everything and action.dest.split(".")[1:2] not in [[name] for name in shown]:
                action.help = SUPPRESS
