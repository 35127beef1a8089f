"""Learning curves: scalars over the steps of a fit, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

#: Points that a curve keeps at most; more would show noise only.
MOST = 200


class Curve:
    """A scalar over steps in ``most`` points or fewer: values, or means of equally many values.

    Values that are not finite are left out.

    >>> curve = Curve(most=4)
    >>> for step in range(1, 8):
    ...     curve.add(step, float(step))
    >>> curve.steps, curve.values
    ([2, 4, 6, 7], [1.5, 3.5, 5.5, 7.0])
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._span = 1  # values that a point is the mean of; the last point may still lack some
        self._points: list[tuple[int, float, int]] = []  # last step, sum of values, their number

    def add(self, step: int, value: float) -> None:
        """Add the value of a step."""
        if not math.isfinite(value):
            return
        if self._points and self._points[-1][2] < self._span:
            _, total, count = self._points[-1]
            self._points[-1] = step, total + value, count + 1
            return
        if len(self._points) == self.most:
            pairs = [self._points[i : i + 2] for i in range(0, self.most, 2)]
            self._points = [
                (pair[-1][0], sum(p[1] for p in pair), sum(p[2] for p in pair)) for pair in pairs
            ]
            self._span *= 2
        self._points.append((step, value, 1))

    @property
    def steps(self) -> list[int]:
        """The last step of each point."""
        return [step for step, _, _ in self._points]

    @property
    def values(self) -> list[float]:
        """The mean of each point."""
        return [total / count for _, total, count in self._points]

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"span": self._span, "points": [list(point) for point in self._points]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Curve:
        """Rebuild from :meth:`state`."""
        curve = cls()
        curve._span = state["span"]
        curve._points = [(step, total, count) for step, total, count in state["points"]]
        return curve
