"""Which of several models nothing else beats in both of two figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from limbeck.core.errors import EvaluationError


def pareto_front(points: Sequence[tuple[float, float]], *, maximise: tuple[bool, bool] = (False, False)) -> list[int]:
    """Places of the points that no other point dominates, in the order of the points.

    A point dominates another that it equals or beats in both figures and beats in one. So equal points stand or fall
    together, and of those that tie in one figure only the best in the other remain. maximise: whether more is better,
    figure by figure. Infinity is a figure like others.

    Raises: EvaluationError when a figure is not a number: it would be neither better nor worse than any.
    """
    for place, point in enumerate(points):
        if any(math.isnan(figure) for figure in point):
            raise EvaluationError(f"point {place} is {point}: expected two numbers. Leave out what was not measured.")
    costs = [tuple(-figure if more else figure for figure, more in zip(point, maximise)) for point in points]
    front: list[int] = []
    best, kept = math.inf, (math.nan, math.nan)
    for place in sorted(range(len(costs)), key=lambda place: costs[place]):
        # In this order only an earlier point can dominate: it must be beaten in the second figure, or equalled in both.
        if not front or costs[place][1] < best or costs[place] == kept:
            front.append(place)
            best, kept = costs[place][1], (costs[place][0], costs[place][1])
    return sorted(front)
