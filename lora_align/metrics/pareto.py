"""Fronts: which of several points none of the others beats, and how much they cover together."""

from collections.abc import Sequence

Point = Sequence[float]  # more is better on every axis


def front(points: Sequence[Point]) -> list[int]:
    """Places of those that no other is as good as everywhere and better than somewhere."""
    return [i for i, one in enumerate(points) if not any(_beats(other, one) for other in points)]


def hypervolume(points: Sequence[Point], worst: Point) -> float:
    """The volume of what lies between the points and the worst one; what is not better than that covers nothing."""
    inside = [point for point in points if all(a > b for a, b in zip(point, worst, strict=True))]
    if not inside:
        return 0.0
    if len(worst) == 1:
        return max(point[0] for point in inside) - worst[0]
    volume, above = 0.0, sorted(inside, key=lambda point: -point[-1])
    for place, point in enumerate(above):  # slab by slab, from the highest of the last axis down
        floor = above[place + 1][-1] if place + 1 < len(above) else worst[-1]
        volume += (point[-1] - floor) * hypervolume([other[:-1] for other in above[: place + 1]], worst[:-1])
    return volume


def _beats(one: Point, other: Point) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))
