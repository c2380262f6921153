"""Where a result is known to be zero, given where each of what it is made of is (None: nowhere known)."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

ZeroRule: TypeAlias = Callable[[Sequence[Tensor | None]], Tensor | None]


def either_zero(zeros: Sequence[Tensor | None]) -> Tensor | None:
    """Return where a product is zero: where any factor is."""
    result = None
    for zero in zeros:
        if zero is not None:
            result = zero if result is None else result | zero
    return result


def both_zero(zeros: Sequence[Tensor | None]) -> Tensor | None:
    """Return where a sum is zero: where all its terms are."""
    result = None
    for zero in zeros:
        if zero is None:
            return None
        result = zero if result is None else result & zero
    return result


def nowhere(zeros: Sequence[Tensor | None]) -> Tensor | None:
    """Say that nothing is known to be zero."""
    return None
