"""How small a module shall get, in the terms in which it matters."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_structopt._checks import require_in
from lightning_structopt.shrinking.costs import Cost, flop_count, parameter_count
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.structure import Structure


class Target(ABC):
    """A cost, and the fraction of it to keep.

    Args:
        keep: In (0, 1].

    Raises:
        ValueError: If ``keep`` is out of range.
    """

    keep: float

    def __post_init__(self) -> None:
        require_in("keep", self.keep, 0, 1, closed="right")

    @abstractmethod
    def cost(self, structure: Structure, groups: list[ChannelGroup]) -> Cost:
        """Return what computes the cost of keeping some labels.

        Args:
            structure: The module.
            groups: The groups that can get smaller.
        """


@dataclass(frozen=True)
class ChannelRatio(Target):
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
class Parameters(Target):
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
class FLOPs(Target):
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
