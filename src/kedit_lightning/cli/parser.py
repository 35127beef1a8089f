"""Lightning's command line, with ``edit`` and packaged configs."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn, get_args
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
from kedit_lightning.cli.base_model_arguments import check_trust, with_one_base_model
from kedit_lightning.cli.completion import completion_script
from kedit_lightning.cli.config_arguments import (
    check_tree,
    with_ability,
    with_all_prompts,
    with_canary,
    with_config_files,
    with_flags,
    with_saved_config,
    with_saved_method,
)
from kedit_lightning.cli.help_layout import FULL_HELP, FullHelp, ShortNames, lay_out
from kedit_lightning.cli.messages import (
    ALLOW_MORE,
    ALLOWED,
    NO_METHOD,
    UsageError,
    explain,
    kedit_error,
)
from kedit_lightning.cli.task_arguments import with_task_settings
from kedit_lightning.errors import DataFileNotFoundError
from kedit_lightning.methods import EditMethod
from kedit_lightning.methods.training.checkpoint import load_checkpoint
from kedit_lightning.registry import Kind, entries, load_plugins
from kedit_lightning.trainer import EditTrainer

#: A cross-reference of reStructuredText, which may span two lines.
_ROLE = r":\s*(?:class|meth|func|attr|mod|ref|doc|paramref):`~?([^`]*?)\s*`"
#: Names of checkpoints that Lightning resolves itself.
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")
#: jsonargparse's own loader of YAML values.
_YAML_LOADER = get_loader("yaml")
#: Keys by which a one-line value is recognised as a config.
_CONFIG_KEYS = {"model", "data", "trainer", "seed_everything", "class_path", "init_args"}


class KEditParser(LightningArgumentParser):
    """Parser whose errors are one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=ShortNames, **kwargs)
        self.shows_all = False

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help without the reStructuredText roles of Lightning's docstrings."""
        if FULL_HELP in self._option_string_actions:
            lay_out(self, self.shows_all)
        return re.sub(_ROLE, r"\1", super().format_help(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error in the arguments, for ``main`` to print.

        Raises:
            KEditError: The cause, or a :class:`UsageError` that explains the parser's message.
        """
        cause = kedit_error(ex)
        if cause is not None:
            raise cause
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
        """Write ``config.yaml``, unless a resumed run has one."""
        if trainer.logger is not None:
            settings = self.config.clone(with_meta=False).as_dict()
            trainer.logger.log_hyperparams({"config": settings})
        assert isinstance(trainer, EditTrainer)
        output, config = trainer.output_folder, self.config
        written = output.resumed if output else stage != "fit"
        if written:
            return
        folder = output.path if output else trainer.fit_folder.path
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.config_filename
        if stage == "fit":
            # Named in `kedit test -c`, it must not send those results into the folder of the fit.
            config = config.clone()
            config["output"] = None
            trainer.fit_folder.config = path
        self.parser.save(config, path, skip_unset=False, overwrite=True)


class KEditCLI(LightningCLI):
    """Adds ``edit`` to ``fit``, ``validate``, ``test`` and ``predict``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, each with parameters of the trainer's method that are no options."""
        shared = {"model", "datamodule", "dataloaders", "weights_only"}
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"},
            "edit": {"model", "datamodule"},
            "test": shared,
            "validate": shared,
            "predict": shared | {"return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give a command its full help."""
        text = "Show this help with all settings of Lightning's trainer, and exit."
        parser.add_argument(FULL_HELP, action=FullHelp, help=text)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse arguments that may name packaged configs and saved runs."""
        own = args is None
        self._typed: list[str] = []
        if args is None:
            # It stays as it is: Lightning starts the other processes of a run with it.
            args = sys.argv[1:]
        if isinstance(args, list):
            self._typed = [str(arg) for arg in args]
            if self._typed[:1] == ["completion"]:
                sys.stdout.write(completion_script(parser, self._typed[1:]))
                raise SystemExit(0)
            args = with_canary(with_ability(with_flags(self._typed)))
            args = with_saved_config(with_task_settings(with_config_files(args)))
            args = with_all_prompts(with_one_base_model(with_saved_method(args)))
        with warnings.catch_warnings():
            if own:
                warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended")
            super().parse_arguments(parser, args)
        self._given_config: Namespace = self.config.clone()
        self._check_method_and_checkpoint()

    def _of_subcommand(self, config: Namespace) -> Any:
        """The part of a config that belongs to the subcommand."""
        name = config.get("subcommand")
        return config if name is None else config[name]

    def _check_method_and_checkpoint(self) -> None:
        config = self._of_subcommand(self.config)
        # Given settings but no class, a parser takes the class that all methods derive from.
        if (config.get("model") or {}).get("class_path", "").split(".")[-1] == EditMethod.__name__:
            raise UsageError(NO_METHOD)
        path = config.get("ckpt_path")
        if path is None or str(path).split(":")[0] in _CHECKPOINT_WORDS:
            return
        if not Path(path).expanduser().is_file():
            raise DataFileNotFoundError(f"there is no checkpoint at {path}; correct --ckpt_path")
        if not is_zipfile(Path(path).expanduser()):
            raise UsageError(f"{path} is no checkpoint that `kedit fit` wrote; correct --ckpt_path")
        load_checkpoint(Path(path).expanduser())

    def before_instantiate_classes(self) -> None:
        """Refuse untrusted code, and warn about settings that a checkpoint overrules."""
        if self._typed:
            check_trust(self._of_subcommand(self.config), self._typed)
        if not self._of_subcommand(self.config).get("ckpt_path"):
            return
        given, used = (
            dict((self._of_subcommand(config).get("model") or {}).get("init_args", {}))
            for config in (self._given_config, self.config)
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


def allow_imports(*plugins: str) -> None:
    """Let configs name what lies below the allowed packages and plug-ins, and nothing else."""
    more = [part.strip() for part in os.environ.get(ALLOW_MORE, "").split(",") if part.strip()]
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*ALLOWED, *more, *plugins],
    )


def keep_sentences() -> None:
    """Keep prompts such as ``Question: who`` text, which YAML would read as a mapping."""

    def load(text: str) -> Any:
        value = _YAML_LOADER(text)
        check_tree(value)
        if "\n" in text.strip() or text.lstrip().startswith(("{", "[")):
            return value
        commented = value is None and text.lstrip().startswith("#")
        sentence = isinstance(value, list) or (
            isinstance(value, dict) and not value.keys() <= _CONFIG_KEYS
        )
        return text if commented or sentence else value

    set_loader("yaml", load, (yaml.YAMLError,))


def cli_arguments(args: ArgsType, run: bool, names_alone: bool = False) -> dict[str, Any]:
    """Arguments of :class:`KEditCLI`, once all classes that a config may name are imported.

    ``run`` runs the subcommand; without it the objects are only built.  Help needs their names
    alone.
    """
    allow_imports(*load_plugins())
    kinds: tuple[Kind, ...] = () if names_alone else get_args(Kind)
    for kind in kinds:  # a config may name each class by its name alone
        for entry in entries(kind).values():
            entry.load()
    keep_sentences()
    return {
        "model_class": EditMethod,
        "datamodule_class": None,  # any data module; predict needs none
        "trainer_class": EditTrainer,
        "save_config_callback": SaveConfig if run else None,
        "subclass_mode_model": True,
        "auto_configure_optimizers": False,
        "seed_everything_default": 0,
        "parser_class": KEditParser,
        "parser_kwargs": {"prog": "kedit", "version": __version__},
        "args": args,
        "run": run,
    }
