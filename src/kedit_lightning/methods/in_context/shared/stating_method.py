"""Methods that state facts before a question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kedit_lightning.edits import PromptEdit, PromptEntry
from kedit_lightning.methods.in_context.shared.demonstrations import statement
from kedit_lightning.methods.method import Capabilities, EditMethod
from kedit_lightning.methods.shared.answer_passes import encoded_answers
from kedit_lightning.methods.shared.row_lengths import (
    RowText,
    Window,
    probe_rows,
    refuse_long,
    too_long_together,
)
from kedit_lightning.methods.shared.row_memory import requests_at_a_time, token_bytes
from kedit_lightning.requests import EditExample, EditRequest, Probe


class StatingMethod(EditMethod):
    """States facts before a question; nothing is trained and no weight changes."""

    can: ClassVar[Capabilities] = Capabilities(encoder_decoder=True, images=True)

    def statement_of(self, request: EditRequest) -> PromptEntry:
        """The statement of a fact, without demonstrations."""
        return statement(request)

    def compute_edit(self, requests: Sequence[EditRequest]) -> PromptEdit:
        """State each fact.

        Raises:
            InvalidRequestError: A fact and its own question do not fit into the window.
        """
        refuse_long(requests, self.too_long)
        entries = [self.statement_of(request) for request in requests]
        return PromptEdit(self.base, entries, self.origin(requests))

    def together(self, requests: Sequence[EditRequest]) -> int:
        """Number of requests whose questions fit into memory together, at least 1."""
        last = len(self.base.layout) - 1  # no gradient needs those of a block that has run
        rows = encoded_answers(self.base, requests)
        stated = self.base.max_tokens * token_bytes(self.base, last)
        return requests_at_a_time(self.base, last, [[row] for row in rows], stated)

    def edits_together(self, requests: Sequence[EditRequest]) -> list[PromptEdit]:
        """The edit of each request; their probabilities are noted together."""
        return [self.compute_edit([request]) for request in requests]

    # ---- lengths

    def rows_of(self, example: EditExample) -> list[RowText]:
        """Each question behind the statement of a fact of its example; other text is dropped."""
        statements = [self.statement_of(request).statement for request in example.requests]
        return [row for text in statements for row in _asked(example, text)]

    def too_long(self, examples: Sequence[EditExample]) -> dict[str, str]:
        """Also those that do not fit together with an example before them.

        Of facts that are in force together, any may be stated before a question.
        """
        clauses = super().too_long(examples)
        if self.run.protocol.grouping != "single":
            left = [example for example in examples if example.id not in clauses]
            stated = [
                [RowText("", self.statement_of(request).statement) for request in example.requests]
                for example in left
            ]
            asked = [_asked(example) for example in left]
            clauses |= too_long_together(Window.of(self.base), left, stated, asked)
        return clauses


def _asked(example: EditExample, before: str = "") -> list[RowText]:
    """Rows of the questions about an example, of which its facts are some, behind a text."""
    facts = [Probe("rewrite", r.prompt, (r.target_new,)) for r in example.requests]
    return [row for probe in (*facts, *example.probes) for row in probe_rows(probe, before)]
