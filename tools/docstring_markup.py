"""Docstrings as Markdown has them: roles such as ``:meth:`edit``` and doctests become code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":\w+:`~?([^`]+)`")
#: A paragraph that opens with a prompt, at the margin of the docstring.
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class DocstringMarkup(Extension):
    """Rewrites the docstring of each object that griffe reads."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)
