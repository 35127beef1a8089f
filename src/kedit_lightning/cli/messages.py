"""Messages about arguments and configs that cannot be used."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningDataModule

from kedit_lightning.cli.main import LISTS, REPORTS
from kedit_lightning.errors import KEditError, article_list
from kedit_lightning.methods import EditMethod

#: Packages that a config may name, so that a config file cannot run arbitrary code.
ALLOWED = ("kedit_lightning", "lightning.pytorch", "torch.optim", "torch.nn", "transformers")
#: The environment variable that adds packages.
ALLOW_MORE = "KEDIT_ALLOW_IMPORTS"
NO_METHOD = "no editing method was named; add one with --model ROME, or -c methods/rome"

#: Messages of the parser, with the nearest key before each.
_KEY = r'Parser key "([\w.]+)": '
_NEAR = r"(?:(?!Parser key).)*?"
_CLASS = r'Parser key "(model|data|[\w.]*callbacks)": ' + _NEAR + r"import path string: (\S+)"
_CLASS_HELP = r"--(model|data|[\w.]*callbacks)\.help: .*import path string: (\S+)"
_COMMAND = r"argument subcommand: invalid choice: '(.+?)' \(choose from (.*?)\)"
_CHOICE = _KEY + _NEAR + r"Literal\[(.*?)\].*? value: (\S+)"
_TYPE = _KEY + _NEAR + r"Expected an? (\S+?)\. Got value: (\S+)"
_UNION = r".*" + _KEY + r"[^:]*Subtypes: \[((?:(?!Parser key).)*?)\] Errors: .*?Given value: (\S+)"


class UsageError(KEditError, ValueError):
    """The command line or a config names something unknown."""


class UsageParser(argparse.ArgumentParser):
    """Parser of a command that takes plain words; what does not fit is a :class:`UsageError`."""

    def __init__(self, usage: str) -> None:
        super().__init__(add_help=False)
        self._words = usage

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments; asked for help, print the usage and end."""
        if {"-h", "--help"} & set(args or ()):
            sys.stdout.write(f"usage: {self._words}\nWhat it does: kedit --help\n")
            raise SystemExit(0)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise the complaint with the usage."""
        raise UsageError(f"{message}; usage: {self._words}")


def kedit_error(error: BaseException | None) -> KEditError | None:
    """The first :class:`KEditError` in a chain of causes, if there is one."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:  # an exception may be its own cause
        chain.append(error)
        error = error.__cause__
    return next((link for link in chain if isinstance(link, KEditError)), None)


def explain(message: str, options: Sequence[str] = ()) -> str:
    """Rewrite a parser's message as a sentence that names a way out, with the known options.

    >>> explain("Unrecognized arguments: --outptu x", ["--output", "--resume"])
    'there is no option --outptu (was --output meant?)'
    """
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", " ".join(message.split()))
    text = text.replace("NoneType", "null").replace("typing.", "")
    if match := re.search(r"Importing '(\S+)' is not allowed", text):
        if match[1].endswith(f".{LightningDataModule.__name__}"):  # what options of no dataset mean
            return (
                "options of the data need a dataset: put --data Requests before them for facts of "
                "your own, or -c data/NAME"
            )
        return (
            f"configs may not name '{match[1]}': they name what lies below {', '.join(ALLOWED)}; "
            f"the environment variable {ALLOW_MORE} adds modules, separated by commas"
        )
    if match := re.search(_COMMAND, text):
        commands = [*re.findall(r"\w+", match[2]), *REPORTS, *LISTS]
        return f"there is no command '{match[1]}'{meant(match[1], commands)}"
    if match := re.search(_CLASS, text) or re.search(_CLASS_HELP, text):
        kind = {"model": EditMethod, "data": LightningDataModule}.get(match[1], Callback)
        return f"there is no '{match[2]}' for --{match[1]}{meant(match[2], known_classes(kind))}"
    if match := re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", text):
        return f"there is no option {match[1]}{meant(match[1], options, limit=0)}"
    if re.search(r"required: (\w+\.)?model", text):
        return NO_METHOD
    # Keys are nested, the one in question last.
    name = "--" + ".".join(re.findall(_KEY, text))
    if match := re.search(_CHOICE, text):
        return f"option {name} must be one of {match[2]}, got '{match[3]}'"
    if match := re.search(r"Option '(\w+)' is not accepted", text):
        kinds = [*known_classes(EditMethod).values(), *known_classes(LightningDataModule).values()]
        known = {parameter for kind in kinds for parameter in inspect.signature(kind).parameters}
        return f"there is no option {name}.{match[1]}{meant(match[1], known, limit=0)}"
    if match := re.search(_TYPE, text):
        return f"option {name} must be {match[2]}, got '{match[3]}'"
    if match := re.search(_UNION, text):
        return f"option {name} must be {match[2].replace(', ', ' or ')}, got '{match[3]}'"
    return re.sub(_KEY, r"option \1: ", text)


def meant(name: str, known: Iterable[str], limit: int = 30) -> str:
    """The known names closest to an unknown one, or else the first ``limit``, in parentheses."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, 3, 0.6)
    close += [other for other in known if other.lower() == name.lower() and other not in close]
    if close:
        return f" (was {' or '.join(close)} meant?)"
    return f" (known are {article_list(known, limit)})" if limit else ""


def known_classes(kind: type[Any]) -> dict[str, type[Any]]:
    """Subclasses that a config may name by class name alone."""
    classes: dict[str, type[Any]] = {}
    child: type[Any]
    for child in kind.__subclasses__():
        foreign = child.__module__.startswith("lightning")
        if not (foreign or inspect.isabstract(child) or child.__name__ == "SaveConfig"):
            classes[child.__name__] = child
        classes |= known_classes(child)
    return classes
