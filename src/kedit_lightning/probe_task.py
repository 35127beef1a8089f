"""What some benchmarks ask of a probe beside its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from kedit_lightning.character_forms import trimmed
from kedit_lightning.errors import InvalidRequestError

#: ``passage``: the answer is a passage, in words. ``characters``: a sentence, character by
#: character. ``opinion``: the answer should be of a sentiment. ``forget``: answers should no longer
#: be given. ``retain``: what was known should stay so. ``ripple``: the probe is part of a test of
#: several questions. ``form``: the fact is asked in another form. ``hop``: the question goes over
#: several facts. ``doubt``: the answer is doubted. ``choice``: right answers stand against wrong.
#: ``defence``: the reply should be safe, whatever else it says.
#: ``concept``: the answer is the definition of a concept. ``instance``: yes or no, whether a thing
#: belongs to a concept. ``trait``: the answer should show a trait of personality.
#: ``picture``: the probe is of a benchmark of facts about pictures.
TaskName: TypeAlias = Literal[
    "passage",
    "characters",
    "opinion",
    "forget",
    "retain",
    "ripple",
    "form",
    "hop",
    "doubt",
    "choice",
    "defence",
    "concept",
    "instance",
    "trait",
    "picture",
]
#: Traits of personality, in the order of the published classifier's classes.
TRAITS = ("neuroticism", "agreeableness", "extraversion")


@dataclass(frozen=True)
class ProbeTask:
    """A task that has metrics of its own, which score its probes beside those for all probes.

    Args:
        name: The task.
        label: The sentiment or trait that is wished; or the name of the test that the probe is part
            of.
        together: Whether any or all questions of a test must be answered for it to pass.
        against: Answers that should no longer be given, become less likely, or are wrong; white
            space at their edges is dropped.
        condition: The probe is asked for one thing only: a test counts where the base model answers
            its conditions. No other metric scores it.
        apart: Only metrics of the task score the probe.

    Raises:
        InvalidRequestError: The task is not known.
    """

    name: TaskName
    label: str = ""
    together: Literal["any", "all"] = "any"
    against: tuple[str, ...] = ()
    condition: bool = False
    apart: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(TaskName):
            rule = f"must be one of {', '.join(get_args(TaskName))}"
            raise InvalidRequestError(f"field 'task' of a probe {rule}, got {self.name!r}")
        object.__setattr__(self, "against", tuple(map(trimmed, self.against)))

    @property
    def has_answers(self) -> bool:
        """Whether some answers are right: a reply may be safe in any words."""
        return self.name != "defence"

    @property
    def is_spoken(self) -> bool:
        """Whether a free answer is asked for, beside probabilities."""
        return self.name != "instance"

    def to_json(self) -> dict[str, Any]:
        """Plain values, without those that are as usual.

        >>> ProbeTask("passage").to_json()
        {'name': 'passage'}
        """
        usual = {field.name: field.default for field in fields(self)}
        values = {name: v for name, v in asdict(self).items() if v != usual[name]}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def scored_by(task: Mapping[str, Any] | None, tasks: tuple[TaskName, ...]) -> bool:
    """Whether a metric scores a probe.

    Args:
        task: The task of the probe as records have it, if it has one.
        tasks: Tasks that the metric is of; a metric of none scores all probes that are asked for
            their answers.
    """
    if task is None or not tasks:
        return not tasks and not (task and (task.get("condition") or task.get("apart")))
    return task["name"] in tasks
