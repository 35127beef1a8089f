"""Instructions that name and describe the task of a request (InstructEdit)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError, article_list
from kedit_lightning.methods.training.episodes import rotate
from kedit_lightning.requests import EditRequest

#: The default template of an instruction.
TEMPLATE = "Task: {task} Description: {description} Input: {prompt}"


def check_template(template: str) -> None:
    """Make sure that a template ends with its only ``{prompt}``.

    Raises:
        UnsupportedUseError: It does not end with ``{prompt}``, or holds it twice.
    """
    if template.count("{prompt}") != 1 or not template.endswith("{prompt}"):
        raise UnsupportedUseError(
            f"template {template!r} must hold {{prompt}} once, at its end, where the answer begins"
        )


def check_tasks(requests: Sequence[EditRequest], tasks: Mapping[str, Sequence[str]]) -> None:
    """Make sure that the task of each request has a description.

    Raises:
        MissingNeedsError: Names every request whose task has none, and the task.
    """
    unknown = [f"{r.label} has task '{r.task}'" for r in requests if not tasks.get(r.task or "")]
    if unknown:
        raise MissingNeedsError(
            f"there is no description of some tasks: {article_list(unknown)}; add descriptions to "
            f"`tasks`, which has {article_list(sorted(tasks)) if tasks else 'none'}"
        )


def instructed(request: EditRequest, template: str, description: str) -> EditRequest:
    """The request with an instruction before its prompt.

    Args:
        request: The request; it names its task.
        template: Text with ``{prompt}`` at its end, and with ``{task}`` and ``{description}``
            anywhere before it.
        description: A description of the request's task.
    """
    # Not str.format: other braces of a prompt or a description are ordinary text.
    head = template.removesuffix("{prompt}")
    name = (request.task or "").replace("_", " ")
    head = head.replace("{task}", name).replace("{description}", description)
    return replace(request, prompt=head + request.prompt)


def training_description(
    request: EditRequest, descriptions: Sequence[str], epoch: int, seed: int
) -> str:
    """The description of an epoch: the next one in each, never the last of several.

    Args:
        request: The request.
        descriptions: The descriptions of its task.
        epoch: Number of the pass over the data.
        seed: Fixes the description of the first epoch.
    """
    name = request.id or request.prompt
    return rotate(descriptions[:-1] or descriptions, 1, epoch, seed, "description", name)[0]
