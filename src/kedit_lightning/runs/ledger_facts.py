"""The facts of a ledger: which are new, which hold, and which edits touch an answer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kedit_lightning.character_forms import comparable
from kedit_lightning.contradictions import OnConflict, consistent, contradictions, describe
from kedit_lightning.errors import InvalidRequestError, article_list
from kedit_lightning.requests import EditRequest


def new_facts(
    before: Sequence[EditRequest],
    requests: Sequence[EditRequest],
    ledger: Path,
    on_conflict: OnConflict = "last",
) -> list[EditRequest]:
    """The facts that do not stand already; says which do, and which standing ones they change.

    Args:
        before: The facts that stand.
        requests: The facts to write.
        ledger: Where they stand, for messages.
        on_conflict: What is done about facts that contradict standing ones.

    Raises:
        InvalidRequestError: Some contradict standing ones, and shall not.
    """
    known = {_fact(request) for request in consistent(before)}
    new = [request for request in requests if _fact(request) not in known]
    if len(new) < len(requests):
        left_out = [repr(r.prompt) for r in requests if _fact(r) in known]
        facts = "fact stands" if len(left_out) == 1 else "facts stand"
        warnings.warn(
            f"{len(left_out)} {facts} in {ledger} already, left out: {article_list(left_out, 5)}",
            stacklevel=3,
        )
    together = [*before, *new]
    found = [p for p in contradictions(together) if p.earlier < len(before) <= p.later]
    if found:
        clause = f"{describe(together, found)}; the first of each stands in {ledger}"
        if on_conflict == "refuse":
            raise InvalidRequestError(
                f"{clause}; revert it, or let the last one be written with on_conflict='last' "
                "(--trainer.protocol.on_conflict last)"
            )
        warnings.warn(f"{clause}, and the last one is written", stacklevel=3)
    return new


def _fact(request: EditRequest) -> tuple[Any, ...]:
    return comparable(request.prompt), request.image, comparable(request.target_new)
