"""Fronts against the definition itself, tried on every pair of points."""

import math
import random

import pytest

from limbeck.core.errors import EvaluationError
from limbeck.evaluate.pareto import pareto_front


def dominates(one, other, maximise):
    better = [a > b if more else a < b for a, b, more in zip(one, other, maximise, strict=True)]
    as_good = [a >= b if more else a <= b for a, b, more in zip(one, other, maximise, strict=True)]
    return all(as_good) and any(better)


def by_definition(points, maximise):
    return [
        place for place, point in enumerate(points) if not any(dominates(other, point, maximise) for other in points)
    ]


def test_by_hand():
    points = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (2.0, 3.0)]
    assert pareto_front(points) == [0, 1, 4, 5]
    assert pareto_front(points, maximise=(True, True)) == [0, 2, 3, 4]
    assert pareto_front(points, maximise=(True, False)) == [4]
    assert pareto_front(points, maximise=(False, True)) == [0]
    assert pareto_front([]) == []
    assert pareto_front([(7, 7)]) == [0]


@pytest.mark.parametrize("maximise", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("values", [3, 12, 10**6])
def test_as_by_definition_with_many_ties_and_with_none(maximise, values):
    chance = random.Random(f"{maximise} {values}")
    figures = [*map(float, range(values))] if values < 100 else [chance.random() for _ in range(values // 100)]
    figures += [math.inf, -math.inf] if values == 12 else []
    for _ in range(300):
        points = [(chance.choice(figures), chance.choice(figures)) for _ in range(chance.randrange(0, 14))]
        found = pareto_front(points, maximise=maximise)
        assert found == by_definition(points, maximise)
        assert bool(found) == bool(points)
        again = [points[place] for place in found]
        assert pareto_front(again, maximise=maximise) == list(range(len(again)))


def test_order_and_scale_do_not_matter():
    chance = random.Random(5)
    points = [(chance.randrange(9), chance.randrange(9)) for _ in range(40)]
    front = {points[place] for place in pareto_front(points)}
    chance.shuffle(points)
    assert {points[place] for place in pareto_front(points)} == front
    assert {points[place] for place in pareto_front([(math.exp(a), 3 * b - 7) for a, b in points])} == front


def test_what_is_no_number_is_refused():
    with pytest.raises(EvaluationError, match="point 1"):
        pareto_front([(1.0, 2.0), (math.nan, 1.0)])
