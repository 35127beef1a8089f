"""Arguments that name tasks, whose settings of methods are put where the parser reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from textwrap import wrap
from typing import Any

from kedit_lightning.cli.base_model_arguments import mapping_of, options_of
from kedit_lightning.cli.messages import UsageError, meant
from kedit_lightning.registry import entries
from kedit_lightning.task_registry import tasks

#: The part of a task's config that is about methods.
_METHODS = "methods"
_CONFIGS = ("-c", "--config")


def with_task_settings(args: list[str]) -> list[str]:
    """Take the settings of methods out of tasks, and give the method that is named its own.

    They stand behind the method's config and the task, whichever comes later, so that they overrule
    both in either order, and options behind them overrule them.

    Raises:
        UsageError: A task has settings of something that is no method.
    """
    found, own, name, last = list[str](), dict[str, dict[str, Any]](), "", 0
    for option, value, words in options_of(args):
        config, named = (mapping_of(value) or {} if option in _CONFIGS else {}), None
        if _METHODS in config:
            for method, settings in _checked(config.pop(_METHODS)).items():
                own[method] = own.get(method, {}) | settings
            words, last = [f"--config={json.dumps(config)}"], len(found) + 1
        if option in _CONFIGS:
            named = config.get("model")
        elif option == "--model":
            named = mapping_of(value) or value
        named = named.get("class_path") if isinstance(named, dict) else named
        found += words
        if isinstance(named, str):
            name, last = named.rpartition(".")[2], len(found)
    if own.get(name):
        model = {"model": {"class_path": name, "init_args": own[name]}}
        found.insert(last, f"--config={json.dumps(model)}")
    return found


def _checked(methods: Any) -> Mapping[str, dict[str, Any]]:
    """Settings by the name of the method."""
    methods = methods or {}
    if not isinstance(methods, dict) or not all(isinstance(v, dict) for v in methods.values()):
        raise UsageError(
            "'methods' of a task must have the name of a method with its settings in each line, "
            f"such as MEND: {{edit_lr: 0.001}}, got {methods!r}"
        )
    for name in methods:
        if name not in entries("method"):
            known = entries("method")
            raise UsageError(
                f"a task has settings of '{name}', which is no method{meant(name, known)}"
            )
    return methods


def task_list() -> str:
    """Text of ``kedit tasks``."""
    lines = ["Tasks, chosen with -c tasks/NAME beside a method, such as -c methods/rome:"]
    for task in tasks().values():
        lines.append(f"  {task.name}")
        changed = [
            f"{name} ({', '.join(settings)})" for name, settings in task.method_settings().items()
        ]
        rows = {
            "asks": task.summary,
            "data": task.dataset,
            "metrics": ", ".join(entries("metric")[m].load().name for m in task.metrics),
            "sets": ", ".join(changed) or "nothing of methods",
        }
        for title, text in rows.items():
            first, *others = wrap(text, 80)
            lines += [f"    {title:<9}{first}", *(f"{'':13}{other}" for other in others)]
    return "\n".join(lines) + "\n"
