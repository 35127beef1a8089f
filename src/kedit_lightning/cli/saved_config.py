"""Arguments taken from the config of a saved run: ``--resume``, and ``--edits`` of ``predict``."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from kedit_lightning.errors import ResumeError


def with_saved_config(args: list[str]) -> list[str]:
    """Add the config of the run that ``--resume`` names, unless arguments give another.

    Raises:
        ResumeError: The folder holds no config.
    """
    saved = _saved_config("--resume", args)
    if saved is None:
        return args
    if not saved.is_file():
        raise ResumeError(
            f"there is no run to resume in '{saved.parent}', which has no config.yaml; name the "
            "folder that --output gave to `kedit test` or `kedit edit`"
        )
    # The saved config holds the folder's name at that time.
    return [args[0], f"--config={saved}", "--output=null", *args[1:]]


def with_saved_method(args: list[str]) -> list[str]:
    """Add the method of the run that ``--edits`` of ``predict`` names, unless one is given.

    The method brings the base model; the run's data and trainer are left out.
    """
    saved = _saved_config("--edits", args) if args[:1] == ["predict"] else None
    if saved is None or not saved.is_file():
        return args
    model = (yaml.safe_load(saved.read_text(encoding="utf-8")) or {}).get("model")
    return [args[0], f"--model={json.dumps(model)}", *args[1:]] if model else args


def _saved_config(option: str, args: list[str]) -> Path | None:
    """The config in the folder that an option names; ``None`` if another config is given."""
    names = [arg.split("=")[0] for arg in args]
    if option not in names or {"-c", "--config", "--model"} & set(names):
        return None
    at = names.index(option)
    folder = args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
    return Path(folder) / "config.yaml"
