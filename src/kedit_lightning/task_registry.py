"""The registry of tasks: data, metrics and settings of methods that belong together.

A task is a config, ``configs/tasks/NAME.yaml``, chosen with ``-c tasks/NAME`` beside any method. It
names data and protocol as other configs do, and under ``methods`` the settings that a method has in
this task. What it is, and which metrics are its own, stands here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Task:
    """A task that can be named on the command line.

    Args:
        name: As in ``-c tasks/NAME``.
        summary: What it asks of an edit, in a few words.
        dataset: The dataset, as the registry has it.
        metrics: Metrics that are scored in this task alone or first of all, as the registry has
            them; those of all datasets come beside them.
        path: Its config; without one it is packaged.
    """

    name: str
    summary: str
    dataset: str
    metrics: tuple[str, ...]
    path: Path | None = None

    @property
    def file(self) -> Path:
        """Its config."""
        packaged = files("kedit_lightning.configs").joinpath("tasks", f"{self.name}.yaml")
        return self.path or Path(str(packaged))

    def method_settings(self) -> dict[str, dict[str, Any]]:
        """Settings that methods have in this task, by the name of the method."""
        values = yaml.safe_load(self.file.read_text(encoding="utf-8"))
        settings: dict[str, dict[str, Any]] = values.get("methods") or {}
        return settings


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a task, such as one of a plug-in; one of the same name is replaced."""
    _TASKS[task.name] = task
    return task


def unregister_task(task: Task) -> None:
    """Remove a task."""
    del _TASKS[task.name]


def tasks() -> dict[str, Task]:
    """All tasks by name, sorted."""
    return dict(sorted(_TASKS.items()))


#: The tasks of this package: what each asks, its dataset, and its metrics.
_OWN: dict[str, tuple[str, str, Iterable[str]]] = {
    "safety": (
        "are replies to attacked questions safe, and those to related questions",
        "SafeEdit",
        ("DefenceSuccess", "DefenceGeneralization", "DefenceChange", "Fluency", "FluencyChange"),
    ),
    "concept": (
        "is a definition replaced, and do instances of the concept follow",
        "ConceptEdit",
        (
            *("InstanceChange", "InstanceToNo", "InstanceToYes", "InstanceUnparsed"),
            *("InstanceShift", "ConsistencyCosine", "ConsistencyJudged"),
        ),
    ),
    "multimodal": (
        "is a fact about a picture written, also asked of another one, and do others stay",
        "EVQA",
        ("TokenMatch", "UnchangedTop1"),
    ),
    "personality": (
        "does an opinion about a topic show the wished trait, and others stay",
        "PersonalityEdit",
        (
            *("OpinionSuccess", "BaseKL", "TraitAccuracy", "TraitShift", "AdjectiveShift"),
            "TraitCoherent",
        ),
    ),
    "truthfulness": (
        "are true answers likelier than common false ones",
        "TruthfulQA",
        ("BestChoice", "RightMass", "RightAbove"),
    ),
    "unstructured": (
        "is a passage of about a hundred words written, and can parts of it be asked for",
        "UnKE",
        (
            *("PassageBleu", "PassageRouge", "PassageRouge1Recall", "PassageRouge2Recall"),
            *("PassageRougeLRecall", "PassageCosine"),
        ),
    ),
}
for _name, (_summary, _dataset, _metrics) in _OWN.items():
    register_task(Task(_name, _summary, _dataset, tuple(_metrics)))
