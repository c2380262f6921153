"""What a module may cost: bounds that a sweep holds candidates against, and channel pruning a module."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole

Costs = Mapping[str, float]


class Constraint(ABC):
    """A bound on one of the costs: ``parameters``, ``bytes``, ``flops`` or ``latency_ms``."""

    @abstractmethod
    def reason(self, costs: Costs) -> str | None:
        """Return why a module of these costs is refused; None if it isn't."""


def _above(costs: Costs, name: str, bound: float, what: str) -> str | None:
    if name not in costs:
        return f"{what} can't be measured: its forward pass takes no part of the batch. Set `example_input_array`."
    return None if costs[name] <= bound else f"{_number(costs[name])} {what}, more than {_number(bound)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class MaxParameters(Constraint):
    """Refuses modules of more parameters.

    Args:
        count: The most that there may be, at least 1.

    Raises:
        TypeError: If ``count`` is not a whole number.
        ValueError: If it is below 1.

    Example:
        >>> MaxParameters(1000).reason({"parameters": 1010})
        '1,010 parameters, more than 1,000'
    """

    count: int

    def __post_init__(self) -> None:
        require_whole("count", self.count, 1)

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "parameters", self.count, "parameters")


@dataclass(frozen=True)
class MaxBytes(Constraint):
    """Refuses modules whose parameters and buffers take more memory.

    Args:
        size_bytes: The most that they may take, at least 1.

    Raises:
        TypeError: If ``size_bytes`` is not a whole number.
        ValueError: If it is below 1.
    """

    size_bytes: int

    def __post_init__(self) -> None:
        require_whole("size_bytes", self.size_bytes, 1)

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "bytes", self.size_bytes, "bytes")


@dataclass(frozen=True)
class MaxFLOPs(Constraint):
    """Refuses modules whose forward pass takes more floating-point operations for one sample.

    Args:
        flops: The most that it may take, above 0.

    Raises:
        TypeError: If ``flops`` is not a number.
        ValueError: If it is not positive.
    """

    flops: float

    def __post_init__(self) -> None:
        require_in("flops", self.flops, 0, float("inf"), closed="neither")

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "flops", self.flops, "FLOPs")


@dataclass(frozen=True)
class MaxLatency(Constraint):
    """Refuses modules whose forward pass takes longer for one sample, on the device that they train on.

    Args:
        milliseconds: The longest that it may take (the median), above 0.

    Raises:
        TypeError: If ``milliseconds`` is not a number.
        ValueError: If it is not positive.
    """

    milliseconds: float

    def __post_init__(self) -> None:
        require_in("milliseconds", self.milliseconds, 0, float("inf"), closed="neither")

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "latency_ms", self.milliseconds, "ms")
