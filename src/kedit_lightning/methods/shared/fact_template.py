"""Texts about a fact, from a template."""

from __future__ import annotations

import re
from dataclasses import replace

from kedit_lightning.chat_turns import put_before, question_in
from kedit_lightning.errors import InvalidRequestError
from kedit_lightning.requests import EditRequest

_BRACES = re.compile(r"\{(subject|task|prompt|target)\}")


def filled_template(template: str, request: EditRequest) -> str:
    r"""A template with the texts of a fact; other braces are ordinary text.

    >>> request = EditRequest("The capital of France is", "Lyon", "France")
    >>> filled_template("Capital of {subject}: {target}\n", request)
    'Capital of France: Lyon\n'

    Raises:
        InvalidRequestError: It names the subject or the task, and the fact has none.
    """
    texts = {
        "subject": request.subject,
        "task": request.task,
        "prompt": question_in(request.prompt),
        "target": request.target_new,
    }

    def text(match: re.Match[str]) -> str:
        found = texts[match.group(1)]
        if found is None:
            raise InvalidRequestError(
                f"{request.label}: field '{match.group(1)}' is absent, and the template "
                f"{template!r} names it; give it, or another template"
            )
        return found

    return _BRACES.sub(text, template)


def conditioned(request: EditRequest, condition: str | None) -> EditRequest:
    """A request with a text before its prompt, from a template; itself without one."""
    if condition is None:
        return request
    return replace(request, prompt=put_before(filled_template(condition, request), request.prompt))
