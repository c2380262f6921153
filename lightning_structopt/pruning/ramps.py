"""How sparsity grows from nothing to its target while training goes on."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override

from lightning_structopt._checks import require_in


class Ramp(ABC):
    """A curve from progress within the pruning window to sparsity.

    A ramp never falls and ends exactly at ``target``.
    """

    @abstractmethod
    def __call__(self, progress: float, target: float) -> float:
        """Return the sparsity at ``progress``.

        Args:
            progress: How much of the window has passed, in [0, 1].
            target: Sparsity at the end of the window, in [0, 1).
        """


@dataclass(frozen=True)
class OneShotRamp(Ramp):
    r"""Everything at the first step of the window, :math:`s(p) = s_f`.

    Example:
        >>> OneShotRamp()(0.0, target=0.9)
        0.9
    """

    @override
    def __call__(self, progress: float, target: float) -> float:
        return target


@dataclass(frozen=True)
class LinearRamp(Ramp):
    r"""The same number of weights at every step, :math:`s(p) = s_f p`.

    Example:
        >>> LinearRamp()(0.5, target=0.9)
        0.45
    """

    @override
    def __call__(self, progress: float, target: float) -> float:
        return target * progress


@dataclass(frozen=True)
class CubicRamp(Ramp):
    r"""Fast at first, gentle at the end, :math:`s(p) = s_f (1 - (1 - p)^3)`.

    Zhu and Gupta, "To prune, or not to prune" (2017), with an initial sparsity of zero.

    Example:
        >>> CubicRamp()(0.5, target=0.5)
        0.4375
    """

    @override
    def __call__(self, progress: float, target: float) -> float:
        return target * (1 - (1 - progress) ** 3)


@dataclass(frozen=True)
class GeometricRamp(Ramp):
    r"""The same share of what is left at every step, :math:`s(p) = 1 - (1 - s_f)^p`.

    This is iterative magnitude pruning as in Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019): with
    ``target=0.8926`` in ten steps, each removes 20% of the weights that remain.

    Example:
        >>> round(GeometricRamp()(0.5, target=0.75), 6)
        0.5
    """

    @override
    def __call__(self, progress: float, target: float) -> float:
        return target if progress >= 1 else 1 - (1 - target) ** progress


@dataclass(frozen=True)
class OneCycleRamp(Ramp):
    r"""Slow, then fast, then slow, :math:`s(p) = s_f \frac{1 + e^{-\alpha + \beta}}{1 + e^{-\alpha p + \beta}}`.

    Hubens et al., "One-Cycle Pruning" (2021).

    Args:
        steepness: :math:`\alpha`, how sharp the rise is; greater than 0.
        offset: :math:`\beta`, how late it comes; the rise is centred on ``offset / steepness``.

    Raises:
        ValueError: If ``steepness`` is not positive or ``offset`` is not finite.

    Example:
        >>> ramp = OneCycleRamp()
        >>> round(ramp(0.0, target=0.9), 3), round(ramp(0.36, target=0.9), 2), ramp(1.0, target=0.9)
        (0.006, 0.46, 0.9)
    """

    steepness: float = 14.0
    offset: float = 5.0

    def __post_init__(self) -> None:
        require_in("steepness", self.steepness, 0, math.inf, closed="neither")
        require_in("offset", self.offset, -math.inf, math.inf, closed="neither")

    @override
    def __call__(self, progress: float, target: float) -> float:
        if progress >= 1:
            return target
        top = 1 + math.exp(-self.steepness + self.offset)
        return target * top / (1 + math.exp(-self.steepness * progress + self.offset))
