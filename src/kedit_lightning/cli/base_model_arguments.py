"""Arguments that say which base model is loaded, how, and whether its own code may run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from kedit_lightning.errors import KEditError

#: The environment variable that lets the code of base models run.
TRUST = "KEDIT_TRUST_REMOTE_CODE"
_OPTION = "--model.base_model"
_CONFIGS = ("-c", "--config")


class UntrustedCodeError(KEditError, ValueError):
    """A config file asks to run code that comes with a model."""


def with_one_base_model(args: list[str]) -> list[str]:
    """Gather a name of the base model and settings of its loading from arguments and configs.

    The parser would let ``--model.base_model.dtype`` replace a name that was given before it, in a
    config too, and ask for a name where the default is meant.

    >>> with_one_base_model(["--model.base_model", "gpt2", "--model.base_model.dtype=bfloat16"])
    ['--model.base_model.name=gpt2', '--model.base_model.dtype=bfloat16']
    >>> with_one_base_model(["--model.base_model", "gpt2"])
    ['--model.base_model', 'gpt2']
    """
    spec: dict[str, Any] = {}
    kept: list[str] = []
    for option, value, words in options_of(args):
        name = option.replace(".init_args", "")
        given: Any = None
        if option in _CONFIGS or name == "--model":
            given, rest = _base_model_of(value, name == "--model")
            if isinstance(given, dict) and "name" not in given:
                words = [f"{option}={rest}"]  # the parser would miss the name
            kept += words
        elif name == _OPTION:
            given = mapping_of(value)
            given = value if given is None else given
        elif name.startswith(f"{_OPTION}.") and name.count(".") == 2:
            given = {name.rpartition(".")[2]: value}
        else:
            kept += words
        spec |= given if isinstance(given, dict) else {} if given is None else {"name": given}
    if not spec.keys() - {"name"} or "class_path" in spec:
        return args
    parts = {"name": spec.pop("name", "nano"), **spec}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in parts.items()}
    return [*kept, *(f"{_OPTION}.{part}={text}" for part, text in texts.items())]


def options_of(args: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each option with its value, and the words that gave them; others with an empty value."""
    rest = list(args)
    while rest:
        option, equals, value = rest[0].partition("=")
        words = 1
        if option.startswith("-") and not equals and rest[1:] and not rest[1].startswith("--"):
            value, words = rest[1], 2
        yield option, value, rest[:words]
        del rest[:words]


def mapping_of(text: str) -> dict[str, Any] | None:
    """The mapping that a text or a file of YAML holds, if it does."""
    inline = any(mark in text for mark in "{\n")
    if not inline and not Path(text).is_file():
        return None
    try:
        value = yaml.safe_load(text if inline else Path(text).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None  # the parser says what is wrong
    return value if isinstance(value, dict) else None


def _base_model_of(text: str, is_model: bool) -> tuple[Any, str]:
    """What a config says about the base model, and the config without it."""
    config = mapping_of(text) or {}
    model = config if is_model else config.get("model")
    settings = model.get("init_args", model) if isinstance(model, dict) else None
    if not isinstance(settings, dict) or "base_model" not in settings:
        return None, text
    given = settings.pop("base_model")
    return given, json.dumps(config)


def check_trust(config: Any, args: Sequence[str]) -> None:
    """Refuse to run the code of a model unless the command line or the environment says so.

    Args:
        config: The parsed config of the command.
        args: The arguments as the user gave them, without those of saved runs.

    Raises:
        UntrustedCodeError: A config file, or one of a saved run, is all that asks for it.
    """
    if os.environ.get(TRUST, "").lower() in ("1", "true", "yes"):
        return
    said = [(option.replace(".init_args", ""), value) for option, value, _ in options_of(args)]
    written = any("trust_remote_code" in value and "{" in value for _, value in said)
    for path in _trusting(config):
        name = "--" + path.replace(".init_args", "").replace(".dict_kwargs", "")
        if not written and name not in dict(said):
            raise UntrustedCodeError(
                f"a config file or saved run sets {name[2:]}, by which code that comes with a "
                f"model runs on this machine; if you trust its source, add {name} true to the "
                f"command or set the environment variable {TRUST}=1"
            )


def _trusting(value: Any, path: str = "") -> Iterator[str]:
    """Paths of settings that let code of a model run."""
    if isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _trusting(item, f"{path}.{place}")
        return
    items = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    for key, item in items.items():
        inner = f"{path}.{key}" if path else str(key)
        if key == "trust_remote_code" and item:
            yield inner
        yield from _trusting(item, inner)
