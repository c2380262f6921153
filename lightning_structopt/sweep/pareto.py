"""Which candidates no other beats in both of two figures."""

from collections.abc import Sequence
from typing import Any

Point = tuple[Any, float, float]


def front(points: Sequence[Point], sign_x: int, sign_y: int) -> list[Point]:
    """Return the points that no other is at least as good as in both figures, and better in one.

    Args:
        points: Things with two figures each.
        sign_x: 1 where more of the first is better, -1 where less is.
        sign_y: Likewise, of the second.

    Example:
        >>> front([("a", 1.0, 5.0), ("b", 2.0, 4.0), ("c", 2.0, 6.0)], -1, -1)
        [('a', 1.0, 5.0), ('b', 2.0, 4.0)]
    """

    def beats(one: Point, other: Point) -> bool:
        gains = (sign_x * (one[1] - other[1]), sign_y * (one[2] - other[2]))
        return min(gains) >= 0 and max(gains) > 0

    return [point for point in points if not any(beats(other, point) for other in points)]
