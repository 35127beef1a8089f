"""Lightning's command line, with ``edit`` and packaged configs."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)

from kedit_lightning import __version__
from kedit_lightning.cli.messages import (
    ALLOW_MORE,
    ALLOWED,
    NO_METHOD,
    UsageError,
    explain,
    kedit_error,
    meant,
)
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, ResumeError
from kedit_lightning.methods import METHODS, EditMethod
from kedit_lightning.trainer import EditTrainer

_PLUGINS = "kedit_lightning.plugins"
#: A cross-reference of a documentation tool, perhaps broken over two lines.
_ROLE = r":\s*(?:class|meth|func|attr|mod|ref|doc|paramref):`~?([^`]*?)\s*`"
#: Words that stand for checkpoints which Lightning finds by itself.
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


#: How jsonargparse reads values before we add to it.
_YAML_LOADER = get_loader("yaml")
#: What a config of one line may begin with.
_CONFIG_KEYS = {"model", "data", "trainer", "seed_everything", "class_path", "init_args"}


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
        if not self.exit_on_error:  # a parser inside another one, which tries several types
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = str(parser.prog).replace(" [options]", "")
        options = [name for name in parser._option_string_actions if name.startswith("--")]
        raise UsageError(f"{explain(message, options)}; `{program} --help` lists what is known")


class SaveConfig(SaveConfigCallback):
    """Saves the config of a run into its output folder; of ``fit``, beside its checkpoints."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml``; a run that is continued keeps the one it has."""
        if trainer.logger is not None:
            settings = self.config.clone(with_meta=False).as_dict()
            trainer.logger.log_hyperparams({"config": settings})
        output = trainer.output_folder if isinstance(trainer, EditTrainer) else None
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
            args = with_named_model(with_saved_method(args))
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
            raise UsageError(NO_METHOD)

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
    """Arguments with the config of the run that ``--resume`` names, if no other is given.

    Raises:
        ResumeError: No run has left its config there.
    """
    saved = _config_of_run("--resume", args)
    if saved is None:
        return args
    if not saved.is_file():
        raise ResumeError(
            f"there is no run to resume in '{saved.parent}', which has no config.yaml; name the "
            "folder that --output gave to `kedit test` or `kedit edit`"
        )
    # The saved config names the folder as it was called then.
    return [args[0], f"--config={saved}", "--output=null", *args[1:]]


def with_saved_method(args: list[str]) -> list[str]:
    """Arguments of ``predict`` with the method of the run that ``--edits`` names, if none is given.

    The method brings the base model; the data and the trainer of that run are no part of it.
    """
    saved = _config_of_run("--edits", args) if args[:1] == ["predict"] else None
    if saved is None or not saved.is_file():
        return args
    model = (yaml.safe_load(saved.read_text(encoding="utf-8")) or {}).get("model")
    return [args[0], f"--model={json.dumps(model)}", *args[1:]] if model else args


def _config_of_run(option: str, args: list[str]) -> Path | None:
    """Where a run leaves its config in the folder an option names, unless another is given."""
    names = [arg.split("=")[0] for arg in args]
    if option not in names or {"-c", "--config", "--model"} & set(names):
        return None
    at = names.index(option)
    folder = args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
    return Path(folder) / "config.yaml"


def with_named_model(args: list[str]) -> list[str]:
    """Arguments with the base model named inside its specification, if they hold parts of one.

    Otherwise ``--model.base_model.dtype`` would replace the name given before it.

    >>> with_named_model(["--model.base_model", "gpt2", "--model.base_model.dtype=bfloat16"])
    ['--model.base_model.name', 'gpt2', '--model.base_model.dtype=bfloat16']
    """
    plain = "--model.base_model"
    if not any(arg.startswith(f"{plain}.") for arg in args):
        return args
    return [
        f"{plain}.name{arg.removeprefix(plain)}" if arg.split("=")[0] == plain else arg
        for arg in args
    ]


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


def read_text_as_it_stands() -> None:
    """Keep prompts such as ``Question: who`` text, which YAML would take for a mapping."""
    read = _YAML_LOADER

    def load(text: str) -> Any:
        value = read(text)
        if "\n" in text.strip() or text.lstrip().startswith(("{", "[")):
            return value
        commented = value is None and text.lstrip().startswith("#")
        sentence = isinstance(value, list) or (
            isinstance(value, dict) and not value.keys() <= _CONFIG_KEYS
        )
        return text if commented or sentence else value

    set_loader("yaml", load, (yaml.YAMLError,))


def run_command_line(args: ArgsType, run: bool) -> KEditCLI:
    """Build the command line and run it.

    Args:
        args: Arguments; those of the process when ``None``.
        run: Run the subcommand.
    """
    more = [part.strip() for part in os.environ.get(ALLOW_MORE, "").split(",") if part.strip()]
    allow_imports([*ALLOWED, *more, *load_plugins()])
    import_classes()
    read_text_as_it_stands()
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
