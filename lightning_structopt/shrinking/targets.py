"""How small a module shall get, in the terms in which it matters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_structopt._checks import require_in
from lightning_structopt.profiling.bounds import MaxBytes as Bound
from lightning_structopt.shrinking.costs import Cost, flop_count, parameter_count, size_count
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.timing import milliseconds


class Target(ABC):
    """A cost, and how much of it to keep."""

    is_limit = False
    """Whether the cost must not be more than the goal; otherwise it shall be as near as possible."""

    @abstractmethod
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        """Return what computes the cost of keeping some labels.

        Args:
            structure: The module.
            groups: The groups that can get smaller.
        """

    @abstractmethod
    def goal(self, whole: float) -> float:
        """Return the cost that a module shall have that now costs ``whole``."""


class _Fraction(Target):
    """Keeps a fraction of a cost."""

    keep: float

    def __post_init__(self) -> None:
        require_in("keep", self.keep, 0, 1, closed="right")

    @override
    def goal(self, whole: float) -> float:
        return self.keep * whole


@dataclass(frozen=True)
class ChannelRatio(_Fraction):
    """Keep this fraction of the members of the groups: the same of each with ``scope="layer"``.

    Parameters and FLOPs shrink faster: halving channels leaves about a quarter of them.

    Args:
        keep: In (0, 1].

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    keep: float

    @override
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        def count(kept: Tensor) -> int:
            return sum(int(kept[group.classes].sum()) for group in groups)

        return count


@dataclass(frozen=True)
class Parameters(_Fraction):
    """Keep this fraction of the module's parameters.

    Args:
        keep: In (0, 1].

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    keep: float

    @override
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        return parameter_count(structure.module, structure.traced)


@dataclass(frozen=True)
class FLOPs(_Fraction):
    """Keep this fraction of the floating-point operations of a forward pass.

    They are counted as :mod:`torch.utils.flop_counter` does: convolutions and matrix products, also those within
    attention and recurrent layers, whatever kernel runs them.

    Args:
        keep: In (0, 1].

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    keep: float

    @override
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        return flop_count(structure.traced)


@dataclass(frozen=True)
class Latency(_Fraction):
    """Keep this fraction of the time that a forward pass takes on this device, in evaluation mode.

    Smaller modules are made and timed until one is found; a warning says if that one, timed again, is off by more
    than a tenth. Time depends on the batch: give the example input that you care for, and leave the machine alone.

    Args:
        keep: In (0, 1].

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    keep: float

    @override
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        return milliseconds(structure)


@dataclass(frozen=True)
class MaxBytes(Bound, Target):
    """Keep what fits into this many bytes of parameters and buffers; of a sweep's candidates, those that do.

    Args:
        size_bytes: At least 1.

    Raises:
        TypeError: If ``size_bytes`` is not a whole number.
        ValueError: If ``size_bytes`` is below 1.

    Example:
        >>> MaxBytes(1000).reason({"bytes": 1010})
        '1,010 bytes, more than 1,000'
    """

    is_limit = True

    @override
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        return size_count(structure.module, structure.traced)

    @override
    def goal(self, whole: float) -> float:
        return min(self.size_bytes, whole)
