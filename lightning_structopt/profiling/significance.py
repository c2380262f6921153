"""Whether a difference between two modules on the same samples is more than chance."""

import math
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from torch import Tensor

_RESAMPLES = 2000
_DISTINCT = 1000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """How the second of two modules differs from the first, sample by sample.

    Args:
        mean: The mean difference.
        low: The lower end of its 95% bootstrap interval.
        high: The upper end.
        p_value: Of the exact McNemar test where samples are right or wrong; None otherwise.
    """

    mean: float
    low: float
    high: float
    p_value: float | None

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(first: Tensor, second: Tensor, seed: int = 0) -> Difference:
    """Compare two modules by one number for each sample, in the same order.

    Args:
        first: (samples,)
        second: (samples,)
        seed: Of the resampling.

    McNemar, "Note on the sampling error of the difference between correlated proportions or percentages" (1947);
    Efron, "Bootstrap Methods: Another Look at the Jackknife" (1979).

    Raises:
        ValueError: If the numbers of samples differ, or there are none.

    Example:
        >>> import torch
        >>> difference(torch.tensor([1.0, 1, 1, 0, 1, 1]), torch.tensor([0.0, 0, 0, 0, 0, 0])).p_value
        0.0625
    """
    if first.shape != second.shape or first.numel() == 0:
        raise ValueError(
            f"Modules must be compared on the same samples. Found {first.numel()} and {second.numel()}. Give a loader "
            "that doesn't shuffle or drop."
        )
    gaps = second.double() - first.double()
    low, high = _interval(gaps, seed)
    binary = bool(((first == 0) | (first == 1)).all() and ((second == 0) | (second == 1)).all())
    p_value = mcnemar(int((gaps < 0).sum()), int((gaps > 0).sum())) if binary else None
    return Difference(float(gaps.mean()), low, high, p_value)


def _interval(gaps: Tensor, seed: int) -> tuple[float, float]:
    """Return where the mean of as many samples lies in 95 of 100 cases."""
    tail = (1 - _CONFIDENCE) / 2
    values, counts = np.unique(gaps.numpy(), return_counts=True)
    if len(values) > _DISTINCT:  # then resampling is slow, and the mean of so many is normal
        margin = NormalDist().inv_cdf(1 - tail) * float(gaps.std()) / math.sqrt(len(gaps))
        return float(gaps.mean()) - margin, float(gaps.mean()) + margin
    # To draw samples with replacement is to draw how often each distinct one comes.
    drawn = np.random.default_rng(seed).multinomial(len(gaps), counts / len(gaps), size=_RESAMPLES)
    low, high = np.quantile(drawn @ values / len(gaps), [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(worse: int, better: int) -> float:
    """Return the two-sided p-value of as uneven a split of ``worse + better`` changes by tossing a coin.

    Example:
        >>> mcnemar(5, 5), mcnemar(0, 6)
        (1.0, 0.03125)
    """
    changes = worse + better
    if changes == 0:
        return 1.0
    tail = sum(math.comb(changes, k) for k in range(min(worse, better) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**changes)))  # whole numbers, as 2.0**changes would overflow
