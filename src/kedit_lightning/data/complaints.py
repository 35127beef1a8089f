"""What is said about the records of a file: those that are left out, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from kedit_lightning.errors import article_list

#: Complaints that a message lists, and records that it names for one; results list all of them.
_SHOWN = 20
_NAMED = 3


class Complaint(NamedTuple):
    """A record that is left out, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def listed(complaints: Sequence[Complaint], file: str) -> str:
    """The complaints about a file as one clause; what holds of several records is said once.

    >>> listed([Complaint("f line 1", "is odd"), Complaint("f line 2", "is odd")], "f")
    'f line 1, line 2: is odd'
    """
    places: dict[str, list[str]] = defaultdict(list)
    for place, reason in complaints:
        found = places[reason]
        found.append(place.removeprefix(f"{file} ") if found else place)
    clauses = [
        f"{article_list(found, _NAMED)}: {reason}"
        for reason, found in list(places.items())[:_SHOWN]
    ]
    left = sum(len(found) for found in list(places.values())[_SHOWN:])
    return "; ".join(clauses) + (f"; and {left} more" if left else "")
