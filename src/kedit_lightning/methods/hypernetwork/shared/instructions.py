"""Instructions: the words that tell a hypernetwork which kind of fact it edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kedit_lightning.errors import MissingNeedsError, UnsupportedUseError, article_list
from kedit_lightning.methods.training.episodes import rotate
from kedit_lightning.requests import EditRequest

#: What a request is put into unless a setting says otherwise.
TEMPLATE = "Task: {task} Description: {description} Input: {prompt}"


def check_template(template: str) -> None:
    """Make sure that a template ends where the answer begins.

    Raises:
        UnsupportedUseError: It does not end with ``{prompt}``, or holds it twice.
    """
    if template.count("{prompt}") != 1 or not template.endswith("{prompt}"):
        raise UnsupportedUseError(
            f"template {template!r} must hold {{prompt}} once, at its end, where the answer begins"
        )


def check_tasks(requests: Sequence[EditRequest], tasks: Mapping[str, Sequence[str]]) -> None:
    """Make sure that the task of each request is described.

    Raises:
        MissingNeedsError: Names every request whose task is not, and the task.
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
            wherever these go.
        description: One of those of the request's task.
    """
    # Not str.format: other braces of a prompt or a description are ordinary text.
    head = template.removesuffix("{prompt}")
    name = (request.task or "").replace("_", " ")
    head = head.replace("{task}", name).replace("{description}", description)
    return replace(request, prompt=head + request.prompt)


def drawn(request: EditRequest, descriptions: Sequence[str], turn: int, seed: int) -> str:
    """A description for training: the next one at each turn, never the last of several.

    Args:
        request: The request.
        descriptions: Those of its task.
        turn: Number of the pass over the data.
        seed: Fixes the description that a request starts with.
    """
    name = request.id or request.prompt
    return rotate(descriptions[:-1] or descriptions, 1, turn, seed, "description", name)[0]
