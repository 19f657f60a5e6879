"""Pareto fronts and their hypervolume."""

from collections.abc import Sequence

Point = Sequence[float]  # higher is better on every axis


def front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the points that no other point dominates."""
    return [i for i, point in enumerate(points) if not any(_dominates(other, point) for other in points)]


def hypervolume(points: Sequence[Point], worst: Point) -> float:
    """Return the volume that the points dominate above the reference point `worst`.

    Points that do not exceed `worst` on every axis add nothing.
    """
    inside = [point for point in points if all(a > b for a, b in zip(point, worst, strict=True))]
    if not inside:
        return 0.0
    if len(worst) == 1:
        return max(point[0] for point in inside) - worst[0]
    volume, above = 0.0, sorted(inside, key=lambda point: -point[-1])
    for i, point in enumerate(above):  # slabs along the last axis, from the highest down
        floor = above[i + 1][-1] if i + 1 < len(above) else worst[-1]
        volume += (point[-1] - floor) * hypervolume([other[:-1] for other in above[: i + 1]], worst[:-1])
    return volume


def _dominates(one: Point, other: Point) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))
