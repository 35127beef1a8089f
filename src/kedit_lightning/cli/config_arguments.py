"""Arguments that name packaged configs and saved runs, rewritten for the parser."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from kedit_lightning.cli.messages import UsageError, meant
from kedit_lightning.errors import DataFileError, DataFileNotFoundError, ResumeError
from kedit_lightning.task_registry import tasks

#: Options that mean yes without a value.
_FLAGS = ("--strict", "--force")
#: Parts of a config beyond which it is no config.
_MOST_PARTS = 100_000


def packaged_configs() -> list[str]:
    """Names of the packaged configs, such as ``methods/rome``; not plans of ``kedit sweep``."""
    root = Path(str(files("kedit_lightning.configs")))
    paths = (path for path in root.rglob("*.yaml") if path.parent.name != "sweeps")
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in paths)


def config_file(name: str) -> str:
    """The file of a config, given as a path or packaged name; YAML text is returned as it is.

    Raises:
        DataFileNotFoundError: There is neither such a file nor such a packaged config.
        DataFileError: The file is no YAML.
    """
    if any(mark in name for mark in "{\n"):  # YAML itself
        return name
    if Path(name).is_file():
        read_yaml(Path(name), "config file")
        return name
    plain = name.removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    known = packaged_configs()
    if plain in known:
        return str(files("kedit_lightning.configs").joinpath(f"{plain}.yaml"))
    folder, _, rest = plain.partition("/")
    if folder == "tasks":
        if rest in tasks():
            return str(tasks()[rest].file)
        known = [f"tasks/{task}" for task in tasks()]
    raise DataFileNotFoundError(
        f"there is no config file '{name}', and none of the packaged configs has that name"
        f"{meant(plain, known)}"
    )


def read_yaml(path: Path, what: str) -> Any:
    """The value of a YAML file, called so in messages.

    Raises:
        DataFileError: The file is no YAML, or its value does not end.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_tree(value)
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataFileError(f"{what} '{path}' is no YAML: {reason}") from error
    return value


def check_tree(value: Any) -> None:
    """Make sure that a YAML value ends: aliases may refer to what they stand in, or multiply it.

    Raises:
        yaml.YAMLError: It does not end, or has more than 100,000 parts.
    """
    parts: list[tuple[Any, frozenset[int]]] = [(value, frozenset())]
    for _ in range(_MOST_PARTS):
        if not parts:
            return
        part, around = parts.pop()
        if id(part) in around:
            raise yaml.YAMLError("it refers to itself: an alias stands inside what it names")
        if isinstance(part, dict | list):
            inside = list(part.values()) if isinstance(part, dict) else part
            parts += [(inner, around | {id(part)}) for inner in inside]
    raise yaml.YAMLError(f"it has more than {_MOST_PARTS} parts")


def with_config_files(args: list[str]) -> list[str]:
    """Replace the names of packaged configs among arguments by their files."""
    args = [
        config_file(arg) if option in ("-c", "--config") else arg
        for option, arg in zip(["", *args], args, strict=False)
    ]
    start = "--config="
    return [start + config_file(a[len(start) :]) if a.startswith(start) else a for a in args]


def with_all_prompts(args: list[str]) -> list[str]:
    """Gather the prompts of ``predict`` in one list; the parser would keep the last one alone.

    >>> with_all_prompts(["predict", "--prompt", "Rome is", "--edits=run", "--prompt=[1]"])
    ['predict', '--edits=run', '--prompt=["Rome is", "[1]"]']
    """
    if args[:1] != ["predict"]:
        return args
    prompts, others, rest = [], [], iter(args)
    for arg in rest:
        if arg.startswith("--prompt="):
            prompts.append(arg.removeprefix("--prompt="))
        elif arg == "--prompt":
            text = next(rest, None)
            if text is None or text.startswith("--"):
                return args  # the parser says what is missing
            prompts.append(text)
        else:
            others.append(arg)
    return [*others, f"--prompt={json.dumps(prompts, ensure_ascii=False)}"] if prompts else args


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
    command = _command_of(saved.parent / "run.json")
    if command is not None and (command == "edit") != (args[0] == "edit"):
        raise ResumeError(
            f"the run in {saved.parent} is one of `kedit {command}`, which goes on with `kedit "
            f"{command} --resume {saved.parent}`"
        )
    # The saved config holds the folder's name at that time.
    return [args[0], f"--config={config_file(str(saved))}", "--output=null", *args[1:]]


def _command_of(path: Path) -> str | None:
    """The command of a run; ``None`` where its record does not say, of which others complain."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    command = run.get("command") if isinstance(run, dict) else None
    return command if isinstance(command, str) else None


def with_saved_method(args: list[str]) -> list[str]:
    """Add method and base model of the run that ``predict --edits`` names, unless one is given."""
    saved = _saved_config("--edits", args) if args[:1] == ["predict"] else None
    if saved is None or not saved.is_file():
        return args
    config = yaml.safe_load(Path(config_file(str(saved))).read_text(encoding="utf-8"))
    model = config.get("model") if isinstance(config, dict) else None
    return [args[0], f"--model={json.dumps(model)}", *args[1:]] if model else args


def with_flags(args: list[str]) -> list[str]:
    """``--strict`` alone as ``--strict=true``: the parser wants a value of each option.

    >>> with_flags(["edit", "--strict", "--output", "run"])
    ['edit', '--strict=true', '--output', 'run']
    """
    pairs = zip(args, [*args[1:], ""], strict=True)
    return [
        f"{arg}=true" if arg in _FLAGS and value not in ("true", "false") else arg
        for arg, value in pairs
    ]


def with_ability(args: list[str]) -> list[str]:
    """``--ability TASK,TASK`` as the callback that answers these tasks; its settings may follow.

    >>> with_ability(["edit", "--ability", "arc_easy,own.yaml"])[1:]
    ['--trainer.callbacks+=AbilityCheck', '--trainer.callbacks.tasks=["arc_easy", "own.yaml"]']
    """
    found, rest = list[str](), iter(args)
    for arg in rest:
        if arg != "--ability" and not arg.startswith("--ability="):
            found.append(arg)
            continue
        tasks = arg.partition("=")[2] or next(rest, "")
        if not tasks or tasks.startswith("--"):
            raise UsageError("--ability needs tasks, such as --ability arc_easy,own.yaml")
        names = json.dumps([name.strip() for name in tasks.split(",")], ensure_ascii=False)
        found += ["--trainer.callbacks+=AbilityCheck", f"--trainer.callbacks.tasks={names}"]
    return found


def with_canary(args: list[str]) -> list[str]:
    """``--canary ACTION`` as the callback that guards a stream; its settings may follow.

    >>> with_canary(["edit", "--canary", "rollback"])[1:]
    ['--trainer.callbacks+=CanaryGuard', '--trainer.callbacks.action=rollback']
    """
    found, rest = list[str](), iter(args)
    for arg in rest:
        if arg != "--canary" and not arg.startswith("--canary="):
            found.append(arg)
            continue
        action = arg.partition("=")[2] or next(rest, "")
        if action not in ("warn", "stop", "rollback"):
            raise UsageError("--canary needs one of warn, stop and rollback")
        found += ["--trainer.callbacks+=CanaryGuard", f"--trainer.callbacks.action={action}"]
    return found


def _saved_config(option: str, args: list[str]) -> Path | None:
    """The config in the folder that an option names; ``None`` if another config is given."""
    names = [arg.split("=")[0] for arg in args]
    if option not in names or {"-c", "--config", "--model"} & set(names):
        return None
    at = names.index(option)
    folder = args[at].partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
    return Path(folder) / "config.yaml"
