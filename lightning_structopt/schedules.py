"""Learning-rate schedules as plain functions of progress: decays from 1."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass

from typing_extensions import override

from lightning_structopt._checks import require_in, require_list, require_type, require_whole


class Schedule(ABC):
    """What the initial learning rate is multiplied by, as a function of progress.

    Write your own by keeping three rules. The value at ``t = 0`` must not depend on ``horizon``, which is not
    known before training starts. Past ``horizon`` a value that depends on it must stay at what it was there.
    Equal arguments give equal values, so that a resumed run repeats the rates of a straight one.

    Example:
        >>> class Half(Schedule):
        ...     needs_horizon = False
        ...
        ...     def __call__(self, t, horizon):
        ...         return 0.5
        >>> Half()(3, horizon=10)
        0.5
    """

    @property
    def needs_horizon(self) -> bool:
        """Whether the value depends on ``horizon``, which must then be finite."""
        return True

    @abstractmethod
    def __call__(self, t: float, horizon: float) -> float:
        """Return the factor on the initial learning rate.

        Args:
            t: Steps or epochs done so far, at least 0.
            horizon: Steps or epochs until training ends; ``math.inf`` where nothing bounds it.
        """


def _fraction(t: float, horizon: float) -> float:
    """Return the share of ``horizon`` that is over, in [0, 1], and 0 at ``t = 0`` whatever the horizon."""
    if t <= 0:
        return 0.0
    return 1.0 if t >= horizon else t / horizon


@dataclass(frozen=True)
class Constant(Schedule):
    r"""No decay, :math:`s(t) = 1`.

    Example:
        >>> Constant()(3, horizon=10)
        1.0
    """

    needs_horizon = False

    @override
    def __call__(self, t: float, horizon: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    r"""A straight line, :math:`s(t) = 1 - (1 - e)\, t / T`.

    Args:
        end: The value :math:`e` at the horizon, in [0, 1].

    Raises:
        ValueError: If ``end`` is outside [0, 1].

    Example:
        >>> Linear(end=0.5)(5, horizon=10)
        0.75
    """

    end: float = 0.0

    def __post_init__(self) -> None:
        require_in("end", self.end, 0, 1)

    @override
    def __call__(self, t: float, horizon: float) -> float:
        over = _fraction(t, horizon)
        return (1 - over) + self.end * over  # exactly 1 at the start and exactly `end` at the end


@dataclass(frozen=True)
class Polynomial(Schedule):
    r"""A power of what is left, :math:`s(t) = e + (1 - e) (1 - t / T)^\beta`; for :math:`e = 0`, step decay.

    Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
    Fully Connected CRFs", 2017 (https://arxiv.org/abs/1606.00915), call it "poly" and use
    :math:`\beta = 0.9`.

    Args:
        power: The exponent :math:`\beta`, in (0, inf). Above 1 it decays early, below 1 late.
        end: The value :math:`e` at the horizon, in [0, 1].

    Raises:
        ValueError: If ``power`` is not positive and finite, or ``end`` is outside [0, 1].

    Example:
        >>> Polynomial(power=2.0)(5, horizon=10)
        0.25
    """

    power: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        require_in("power", self.power, 0, math.inf, closed="neither")
        require_in("end", self.end, 0, 1)

    @override
    def __call__(self, t: float, horizon: float) -> float:
        left = 1 - _fraction(t, horizon)  # never negative: a fractional power of it would be complex
        return float(self.end + (1 - self.end) * left**self.power)


@dataclass(frozen=True)
class Exponential(Schedule):
    r"""Exponential decay, :math:`s(t) = \gamma^t`.

    Args:
        gamma: Factor per step or epoch, in (0, 1].

    Raises:
        ValueError: If ``gamma`` is outside (0, 1].

    Example:
        >>> Exponential(gamma=0.5)(3, horizon=10)
        0.125
    """

    gamma: float

    needs_horizon = False

    def __post_init__(self) -> None:
        require_in("gamma", self.gamma, 0, 1, closed="right")

    @override
    def __call__(self, t: float, horizon: float) -> float:
        return float(self.gamma**t)


@dataclass(frozen=True)
class Step(Schedule):
    r"""A drop every so often, :math:`s(t) = \gamma^{\lfloor t / n \rfloor}`.

    Not to be confused with step decay, which is ``Polynomial``.

    Args:
        step_size: Steps or epochs :math:`n` between two drops, a whole number of at least 1.
        gamma: Factor per drop, in (0, 1].

    Raises:
        ValueError: If ``step_size`` is smaller than 1 or ``gamma`` is outside (0, 1].
        TypeError: If ``step_size`` is not a whole number.

    Example:
        >>> [Step(step_size=2, gamma=0.5)(t, horizon=10) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    step_size: int
    gamma: float = 0.1

    needs_horizon = False

    def __post_init__(self) -> None:
        require_whole("step_size", self.step_size, 1)
        require_in("gamma", self.gamma, 0, 1, closed="right")

    @override
    def __call__(self, t: float, horizon: float) -> float:
        return float(self.gamma ** (t // self.step_size))


@dataclass(frozen=True)
class MultiStep(Schedule):
    r"""A drop at each milestone, :math:`s(t) = \gamma^{|\{m : m \le t\}|}`.

    Args:
        milestones: When the drops come, in steps or epochs: whole numbers of at least 1, each larger than the
            one before. A list becomes a tuple.
        gamma: Factor per drop, in (0, 1].

    Raises:
        ValueError: If there is no milestone, one is smaller than 1 or they do not increase, or ``gamma`` is
            outside (0, 1].
        TypeError: If a milestone is not a whole number.

    Example:
        >>> [MultiStep(milestones=(1, 3), gamma=0.5)(t, horizon=10) for t in range(5)]
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """

    milestones: tuple[int, ...]
    gamma: float = 0.1

    needs_horizon = False

    def __post_init__(self) -> None:
        require_list("milestones", self.milestones)
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            require_whole("milestones", milestone, 1)
        if not self.milestones or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"`milestones` must rise, one at least. Found `milestones = {self.milestones}`.")
        require_in("gamma", self.gamma, 0, 1, closed="right")

    @override
    def __call__(self, t: float, horizon: float) -> float:
        return float(self.gamma ** bisect_right(self.milestones, t))


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Half a cosine wave, :math:`s(t) = m + (1 - m) \frac{1 + \cos(\pi t / T)}{2}`.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017
    (https://arxiv.org/abs/1608.03983), without the restarts.

    Args:
        minimum: The value :math:`m` at the horizon, as a fraction of the initial rate, in [0, 1].

    Raises:
        ValueError: If ``minimum`` is outside [0, 1].

    Example:
        >>> Cosine(minimum=0.5)(10, horizon=10)
        0.5
    """

    minimum: float = 0.0

    def __post_init__(self) -> None:
        require_in("minimum", self.minimum, 0, 1)

    @override
    def __call__(self, t: float, horizon: float) -> float:
        wave = (1 + math.cos(math.pi * _fraction(t, horizon))) / 2
        return self.minimum + (1 - self.minimum) * wave


@dataclass(frozen=True)
class Warmup(Schedule):
    r"""A linear rise from :math:`r` to 1 over :math:`n` steps or epochs, then another schedule for the rest.

    .. math:: s(t, T) = r + (1 - r)\, t / n \text{ for } t < n, \quad \text{then } s'(t - n, T - n)

    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017
    (https://arxiv.org/abs/1706.02677).

    Args:
        steps: Length :math:`n` of the rise in steps or epochs, a whole number of at least 1.
        then: The schedule :math:`s'` that follows; it starts and ends its own course in what is left.
        start: The value :math:`r` at the very beginning, in [0, 1]. With 0 the first step changes no weight.

    Raises:
        ValueError: If ``steps`` is smaller than 1 or ``start`` is outside [0, 1].
        TypeError: If ``steps`` is not a whole number or ``then`` is not a schedule.

    Example:
        >>> [Warmup(steps=2, then=Linear())(t, horizon=4) for t in range(5)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """

    steps: int
    then: Schedule
    start: float = 0.0

    def __post_init__(self) -> None:
        require_whole("steps", self.steps, 1)
        require_type("then", self.then, Schedule)
        require_in("start", self.start, 0, 1)

    @property
    @override
    def needs_horizon(self) -> bool:
        return self.then.needs_horizon

    @override
    def __call__(self, t: float, horizon: float) -> float:
        if t >= self.steps:
            return self.then(t - self.steps, horizon - self.steps)
        rise = t / self.steps
        return self.start * (1 - rise) + rise
