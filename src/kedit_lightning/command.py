"""Lightning's command line, with ``edit`` and packaged configs."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

from kedit_lightning import __version__
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, KEditError, article_list
from kedit_lightning.methods import METHODS, EditMethod
from kedit_lightning.trainer import EditTrainer

#: What a config may name. A config file then cannot run code of its own choice.
_ALLOWED = ("kedit_lightning", "lightning.pytorch", "torch.optim", "torch.nn", "transformers")
_PLUGINS = "kedit_lightning.plugins"
_ALLOW_MORE = "KEDIT_ALLOW_IMPORTS"
_CLASSES = (EditMethod, LightningDataModule, Callback)
_NO_METHOD = "no editing method was named; add one with --model ROME, or -c methods/rome"
#: A cross-reference of a documentation tool, perhaps broken over two lines.
_ROLE = r":\s*(?:class|meth|func|attr|mod|ref|doc|paramref):`~?([^`]*?)\s*`"
#: Words that stand for checkpoints which Lightning finds by itself.
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class KEditParser(LightningArgumentParser):
    """Parser whose errors are one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help without the markup that Lightning's own docstrings carry."""
        return re.sub(_ROLE, r"\1", super().format_help(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what was wrong with the arguments, for ``main`` to print."""
        found = kedit_error(ex)
        if found is not None:
            raise found
        parser = getattr(ex, "subcommand_parser", None) or self
        program = str(parser.prog).replace(" [options]", "")
        options = [name for name in parser._option_string_actions if name.startswith("--")]
        raise UsageError(f"{explain(message, options)}; `{program} --help` lists what is known")


class UsageError(KEditError, ValueError):
    """The command line or a config holds something that is not known."""


def kedit_error(error: BaseException | None) -> KEditError | None:
    """The error for the user in a chain of causes, if there is one.

    Args:
        error: What was raised.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KEditError):
            return error
        seen.add(id(error))
        error = error.__cause__
    return None


def explain(message: str, options: Sequence[str] = ()) -> str:
    """A parser's message as a sentence a user can act on.

    Args:
        message: The message, perhaps over several lines.
        options: Options that are known.

    >>> explain("Unrecognized arguments: --outptu x", ["--output", "--resume"])
    'there is no option --outptu (was --output meant?)'
    """
    text = " ".join(message.split())
    if found := re.search(r"Importing '(\S+)' is not allowed", text):
        return (
            f"configs may not name '{found[1]}': they name what lies below {', '.join(_ALLOWED)}; "
            f"the environment variable {_ALLOW_MORE} adds modules, separated by commas"
        )
    if found := re.search(r'Parser key "([\w.]+)".*Expected a dot import path string: (\S+)', text):
        kind = {"model": EditMethod, "data": LightningDataModule}.get(found[1], Callback)
        known = sorted(name for name in known_classes(kind) if not name.startswith("_"))
        return f"there is no '{found[2]}' for --{found[1]}{meant(found[2], known)}"
    if found := re.search(r"Option '(\w+)' is not accepted", text):
        fields = [name for kind in _CLASSES for name in known_fields(kind)]
        return f"there is no option '{found[1]}'{meant(found[1], fields, limit=0)}"
    if found := re.search(r"[Uu]nrecognized arguments: (--[\w.]+)", text):
        return f"there is no option {found[1]}{meant(found[1], options, limit=0)}"
    if found := re.search(r'Parser key "([\w.]+)": .*Literal\[(.*?)\].*Got value: (\S+)', text):
        return f"option {found[1]} must be one of {found[2]}, got '{found[3]}'"
    if re.search(r"required: (\w+\.)?model", text):
        return _NO_METHOD
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text).replace("NoneType", "null")
    if found := re.search(r'key "([\w.]+)": .*Subtypes: \[(.*)\] Errors: .*value: (.*)', text):
        return f"option {found[1]} must be {found[2].replace(', ', ' or ')}, got {found[3]!r}"
    return re.sub(r'Parser key "([\w.]+)": ', r"option \1: ", text)


def meant(name: str, known: Iterable[str], limit: int = 30) -> str:
    """What an unknown name is close to, or else the first of what is known, in parentheses."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, 3, 0.6)
    close += [other for other in known if other.lower() == name.lower() and other not in close]
    if close:
        return f" (was {' or '.join(close)} meant?)"
    return f" (known are {article_list(known, limit)})" if limit else ""


def known_classes(kind: type[Any]) -> dict[str, type[Any]]:
    """Classes that a config may name by class name alone, below a class."""
    found: dict[str, type[Any]] = {}
    child: type[Any]
    for child in kind.__subclasses__():
        if not child.__module__.startswith("lightning") and not inspect.isabstract(child):
            found[child.__name__] = child
        found |= known_classes(child)
    return found


def known_fields(kind: type[Any]) -> Iterator[str]:
    """Names of the settings of all classes below a class."""
    for child in known_classes(kind).values():
        yield from inspect.signature(child).parameters


class SaveConfig(SaveConfigCallback):
    """Saves the config of a run into its output folder; of ``fit``, beside its checkpoints."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; a run that is continued keeps the one it has."""
        if trainer.logger is not None:
            settings = self.config.clone(with_meta=False).as_dict()
            trainer.logger.log_hyperparams({"config": settings})
        output = getattr(trainer, "output_folder", None)
        if output is not None:
            if output.resumed:
                return
            folder = output.path
        elif stage == "fit":
            folder = Path(trainer.log_dir or trainer.default_root_dir)
        else:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.parser.save(
            self.config, folder / self.config_filename, skip_unset=False, overwrite=True
        )


class KEditCLI(LightningCLI):
    """Adds ``edit`` to ``fit``, ``validate``, ``test`` and ``predict``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Subcommands, each with the parameters that are no options."""
        shared = {"model", "datamodule", "dataloaders", "weights_only"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "edit": {"model", "datamodule"},
            "test": shared,
            "validate": shared,
            "predict": shared | {"return_predictions"},
        }

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse arguments, with names of packaged configs in place of files."""
        if args is None:
            args = sys.argv[1:]
            sys.argv[1:] = []  # Lightning warns when both are given
        if isinstance(args, list):
            args = with_saved_config(with_config_files([str(arg) for arg in args]))
        super().parse_arguments(parser, args)
        self._as_given: Namespace = self.config.clone()
        self._check_method()
        self._check_checkpoint()

    def _own(self, config: Namespace) -> Any:
        """The part of a config that belongs to the subcommand."""
        name = config.get("subcommand")
        return config if name is None else config[name]

    def _check_method(self) -> None:
        # Given settings but no class, a parser takes the class that all methods derive from.
        model = self._own(self.config).get("model") or {}
        if model.get("class_path", "").rpartition(".")[2] == EditMethod.__name__:
            raise UsageError(_NO_METHOD)

    def _check_checkpoint(self) -> None:
        path = self._own(self.config).get("ckpt_path")
        known = path is None or str(path).split(":")[0] in _CHECKPOINT_WORDS
        if not known and not Path(path).expanduser().is_file():
            raise DataFileNotFoundError(f"there is no checkpoint at {path}; correct --ckpt_path")
        if not known and not is_zipfile(Path(path).expanduser()):
            raise UsageError(f"{path} is no checkpoint that `kedit fit` wrote; correct --ckpt_path")

    def before_instantiate_classes(self) -> None:
        """Say which settings a checkpoint overrules."""
        if not self._own(self.config).get("ckpt_path"):
            return
        given, used = (
            dict((self._own(config).get("model") or {}).get("init_args", {}))
            for config in (self._as_given, self.config)
        )
        changed = [
            f"{key}: {value!r} -> {used[key]!r}"
            for key, value in given.items()
            if key in used and used[key] != value
        ]
        if changed:
            warnings.warn(
                "the checkpoint overrules these settings of the method: " + "; ".join(changed),
                stacklevel=2,
            )


# ---- configs


def packaged_configs() -> list[str]:
    """Names of the packaged configs, such as ``methods/rome``."""
    root = Path(str(files("kedit_lightning.configs")))
    found = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found)


def config_file(name: str) -> str:
    """The file of a config that is named by file, or by the name of a packaged one.

    Args:
        name: What was given behind ``-c``.

    Raises:
        DataFileNotFoundError: There is neither.
        DataFileError: The file is no YAML.
    """
    if any(mark in name for mark in "{\n"):  # YAML itself
        return name
    if Path(name).is_file():
        try:
            yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataFileError(f"config file '{name}' is no YAML: {error}") from error
        return name
    plain = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    known = packaged_configs()
    if plain in known:
        return str(files("kedit_lightning.configs").joinpath(f"{plain}.yaml"))
    raise DataFileNotFoundError(
        f"there is no config file '{name}', and none of the packaged configs has that name"
        f"{meant(plain, known)}"
    )


def with_config_files(args: list[str]) -> list[str]:
    """Arguments with the files of packaged configs in place of their names."""
    done: list[str] = []
    expected = False
    for arg in args:
        if expected:
            done.append(config_file(arg))
            expected = False
        elif arg.startswith("--config="):
            done.append(f"--config={config_file(arg.removeprefix('--config='))}")
        else:
            expected = arg in ("-c", "--config")
            done.append(arg)
    return done


def with_saved_config(args: list[str]) -> list[str]:
    """Arguments with the config of the run that ``--resume`` names, if no other is given."""
    names = [arg.split("=")[0] for arg in args]
    if "--resume" not in names or {"-c", "--config", "--model"} & set(names):
        return args
    at = names.index("--resume")
    folder = args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
    saved = Path(folder) / "config.yaml"
    if not saved.is_file():
        return args
    # The saved config names the folder as it was called then.
    return [args[0], f"--config={saved}", "--output=null", *args[1:]]


# ---- what configs may name


def allow_imports(paths: Iterable[str]) -> None:
    """Let configs name what lies below these modules, and nothing else."""
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=list(paths),
    )


def load_plugins() -> list[str]:
    """Import outside methods and datasets, and give the modules they live in."""
    modules = []
    for point in entry_points(group=_PLUGINS):
        try:
            point.load()
        except Exception as error:
            warnings.warn(f"plug-in '{point.name}' cannot be loaded: {error}", stacklevel=2)
        else:
            modules.append(point.module.partition(".")[0])
    return modules


def import_classes() -> None:
    """Import what configs may name by class name alone."""
    methods, data = (import_module(f"kedit_lightning.{name}") for name in ("methods", "data"))
    for name in METHODS:
        getattr(methods, name)
    for name in data.__all__:
        getattr(data, name)
    import_module("kedit_lightning.callbacks")


def run_command_line(args: ArgsType, run: bool) -> KEditCLI:
    """Build the command line and run it.

    Args:
        args: Arguments; those of the process when ``None``.
        run: Run the subcommand.
    """
    more = [part.strip() for part in os.environ.get(_ALLOW_MORE, "").split(",") if part.strip()]
    allow_imports([*_ALLOWED, *more, *load_plugins()])
    import_classes()
    return KEditCLI(
        EditMethod,
        None,  # any data module; predict needs none
        trainer_class=EditTrainer,
        save_config_callback=SaveConfig if run else None,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        parser_class=KEditParser,
        parser_kwargs={"prog": "kedit", "version": __version__},
        args=args,
        run=run,
    )
