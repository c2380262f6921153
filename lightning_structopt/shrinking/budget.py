"""What a module costs without some of its channels, and which ones go for a target."""

import torch
from torch import Tensor

from lightning_structopt.shrinking.choice import Order
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.targets import Target

TOLERANCE = 0.02
NOTHING = torch.empty(0, dtype=torch.int64)


class Budget:
    """Costs of a module in the terms of a target.

    Args:
        structure: The module.
        groups: The groups that can get smaller.
        target: How small it shall get.
    """

    def __init__(self, structure: Structure, groups: list[ChannelGroup], target: Target) -> None:
        self._structure = structure
        self._target = target
        self._measure = target.cost(structure, groups)
        self.whole = self.cost(NOTHING)
        self.goal = target.goal(self.whole)

    def cost(self, dropped: Tensor) -> float:
        """Return the cost without these classes."""
        return self._measure(self._structure.kept_without(dropped))

    @property
    def keep(self) -> float:
        """The fraction of the cost that shall be left."""
        return self.goal / self.whole if self.whole else 1.0

    def left(self, dropped: Tensor) -> float:
        """Return the fraction of the cost that is left without these classes."""
        return self.cost(dropped) / self.whole if self.whole else 1.0

    def require_reachable(self, order: Order) -> None:
        """Raise if not enough of a module can go.

        Raises:
            ValueError: If the target is below what is left at the least.
        """
        least = self.cost(order.dropped(len(order.sequence)))
        slack = 0 if self._target.is_limit else TOLERANCE * self.whole
        if least > self.goal + slack:
            raise ValueError(
                f"`{self._target!r}` must be within reach. Found that {least / self.whole:.3f} is left at the least, "
                f"{least:,.6g} of {self.whole:,.6g}. Keep more, or allow more: a smaller `minimum` or `round_to`, a "
                "shorter `exclude`, `include_normalized=True`."
            )

    def choose(self, order: Order, keep: float | None = None) -> Tensor:
        """Return the classes that go so that the target is met, or so that another fraction is left."""
        goal = self.goal if keep is None else keep * self.whole
        return order.search(self.cost, goal, at_most=self._target.is_limit)
