"""Fronts and volumes against their definitions."""

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_align.metrics.pareto import front, hypervolume

POINTS = st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=8)


@given(POINTS)
def test_volume_is_that_of_the_unit_cubes_below_some_point(points: list[tuple[int, int, int]]) -> None:
    cubes = numpy.zeros((6, 6, 6), dtype=bool)
    for a, b, c in points:
        cubes[:a, :b, :c] = True
    assert hypervolume(points, (0, 0, 0)) == pytest.approx(cubes.sum())


@given(POINTS)
def test_the_front_covers_all_that_the_points_do_and_needs_each_of_its_own(points: list[tuple[int, int, int]]) -> None:
    kept = [points[place] for place in front(points)]
    worst = (-1, -1, -1)
    assert hypervolume(kept, worst) == pytest.approx(hypervolume(points, worst))
    for point in set(kept):
        rest = [other for other in kept if other != point]
        assert hypervolume(rest, worst) < hypervolume(kept, worst)


def test_a_point_that_is_as_good_is_not_beaten() -> None:
    assert front([(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0)]) == [0, 1, 2]
