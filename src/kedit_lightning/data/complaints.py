"""What is said about the records of a file."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from kedit_lightning.character_forms import comparable
from kedit_lightning.contradictions import contradictions, describe
from kedit_lightning.data.field_names import meant
from kedit_lightning.data.records import Record
from kedit_lightning.errors import article_list
from kedit_lightning.requests import EditExample

#: Complaints that a message lists, and records that it names for one; results list all of them.
#: Of a file in a foreign format a few will do.
SHOWN = 20
SHOWN_OF_FOREIGN = 2
_NAMED = 3


class Complaint(NamedTuple):
    """A record that is left out, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def listed(complaints: Sequence[Complaint], file: str, most: int = SHOWN) -> str:
    """The complaints about a file as one clause; what holds of several records is said once.

    >>> listed([Complaint("f line 1", "is odd"), Complaint("f line 2", "is odd")], "f")
    'f line 1, line 2: is odd'
    """
    places: dict[str, list[str]] = defaultdict(list)
    for place, reason in complaints:
        found = places[reason]
        found.append(place.removeprefix(f"{file} ") if found else place)
    clauses = [
        f"{article_list(found, _NAMED)}: {reason}" for reason, found in list(places.items())[:most]
    ]
    left = sum(len(found) for found in list(places.values())[most:])
    return "; ".join(clauses) + (f"; and {left} more" if left else "")


def unread_fields(records: Sequence[Record], known: Collection[str]) -> str:
    """The fields of records that are not known, and what they may stand for, as a clause."""
    rows = [record.values for record in records if isinstance(record.values, dict)]
    unread = Counter(str(key) for row in rows for key in row if key not in known)
    if not unread:
        return ""
    names = article_list([f"'{key}' ({count} records)" for key, count in unread.items()])
    forms = (meant(key, known, f"{{}} is what '{key}' says") for key in unread)
    alike = article_list(list(filter(None, forms)))
    return f"{names}; it reads {', '.join(sorted(known))}" + (
        f" (perhaps {alike})" if alike else ""
    )


def contradictory(examples: Sequence[EditExample]) -> tuple[int, str]:
    """Number of prompts that come with different targets, and a sentence about them."""
    requests = [request for example in examples for request in example.requests]
    if not (found := contradictions(requests)):
        return 0, ""
    count = len({comparable(requests[pair.earlier].prompt) for pair in found})
    return count, (
        f"{describe(requests, found)}; the last one alone is written where facts shall hold "
        "together (a batch, and `kedit edit`), each in its turn in a sequence of `kedit test`; "
        "protocol.on_conflict refuse ends a run instead"
    )


def lost_subjects(file: str, ids: Sequence[str]) -> str:
    """A sentence about records whose subject their prompt lacks."""
    return (
        f"{file}: {len(ids)} record{'s' * (len(ids) > 1)} name a subject that the prompt has in "
        f"other words ({article_list(list(ids), _NAMED)}); they are read without one, so methods "
        "that need a subject refuse them"
    )
