"""Pareto fronts and hypervolumes against their definitions."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_align.metrics.pareto import front, hypervolume

POINTS = st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=8)


@given(POINTS)
def test_hypervolume_counts_dominated_unit_cubes(points: list[tuple[int, int, int]]) -> None:
    cubes = numpy.zeros((6, 6, 6), dtype=bool)
    for a, b, c in points:
        cubes[:a, :b, :c] = True
    assert hypervolume(points, (0, 0, 0)) == pytest.approx(cubes.sum())


@given(POINTS)
def test_front_is_minimal_and_keeps_the_hypervolume(points: list[tuple[int, int, int]]) -> None:
    best = [points[i] for i in front(points)]
    worst = (-1, -1, -1)
    assert hypervolume(best, worst) == pytest.approx(hypervolume(points, worst))
    for point in set(best):
        others = [other for other in best if other != point]
        assert hypervolume(others, worst) < hypervolume(best, worst)


def test_equal_points_do_not_dominate_each_other() -> None:
    assert front([(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0)]) == [0, 1, 2]
