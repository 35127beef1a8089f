"""Yes and no as answers, read from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence


def yes_or_no(yes: Sequence[bool], no: Sequence[bool]) -> bool | None:
    """What greedy decoding says: True for yes, False for no, ``None`` for neither.

    ``yes`` and ``no`` tell of each form of the answer (Yes, yes) whether all of its tokens are
    arg-max.

    >>> yes_or_no([False, True], [False, False]), yes_or_no([False], [True]), yes_or_no([0], [0])
    (True, False, None)
    """
    return None if any(yes) == any(no) else any(yes)


def share_of_yes(yes: Sequence[float], no: Sequence[float]) -> float:
    """Share of the probability of both answers that yes has.

    ``yes`` and ``no`` are the log-probabilities of the forms of each.

    >>> round(share_of_yes([math.log(0.2), math.log(0.1)], [math.log(0.1)]), 4)
    0.75
    """
    top = max(*yes, *no)
    masses = [sum(math.exp(value - top) for value in side) for side in (yes, no)]
    return masses[0] / sum(masses)
