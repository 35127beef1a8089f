"""Packaged configs, and arguments that name them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import yaml

from kedit_lightning.cli.messages import meant
from kedit_lightning.errors import DataFileError, DataFileNotFoundError


def packaged_configs() -> list[str]:
    """Names of the packaged configs, such as ``methods/rome``."""
    root = Path(str(files("kedit_lightning.configs")))
    paths = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths)


def config_file(name: str) -> str:
    """The file of a config, given as a path or as the name of a packaged config.

    Args:
        name: The value of ``-c``; YAML text is returned as it is.

    Raises:
        DataFileNotFoundError: There is neither such a file nor such a packaged config.
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
    """Replace the names of packaged configs among arguments by their files."""
    replaced: list[str] = []
    after_option = False
    for arg in args:
        if after_option:
            replaced.append(config_file(arg))
            after_option = False
        elif arg.startswith("--config="):
            replaced.append(f"--config={config_file(arg.removeprefix('--config='))}")
        else:
            after_option = arg in ("-c", "--config")
            replaced.append(arg)
    return replaced


def with_named_model(args: list[str]) -> list[str]:
    """Move the name of the base model into its specification, if arguments set parts of one.

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
