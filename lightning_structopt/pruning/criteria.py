"""How important a weight is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt._checks import require_choice


@dataclass(frozen=True)
class Scores:
    """The importance of every weight, by parameter name.

    Args:
        values: One tensor a parameter, of the parameter's shape.
        power: If given, the score is ``|value| ** power``. Ranking then reads the values as they are, so that
            magnitude pruning builds no copy of the weights.
    """

    values: Mapping[str, Tensor]
    power: int | None = None

    def ranked(self, name: str) -> Tensor:
        """Return a tensor that is ordered as the scores of parameter ``name`` are."""
        return self.values[name] if self.power is None else self.values[name].abs()

    def dense(self, name: str) -> Tensor:
        """Return the scores of parameter ``name`` themselves, in at least float32, ready to be added up."""
        values = self.values[name].to(torch.promote_types(self.values[name].dtype, torch.float32))
        return values if self.power is None else values.abs() ** self.power


class Criterion(ABC):
    """A rule that gives every weight a score; the lowest are pruned first."""

    @abstractmethod
    def score(self, weights: Mapping[str, Tensor]) -> Scores:
        """Score ``weights``.

        Args:
            weights: The weights by parameter name, of any shape; not modified.
        """


@dataclass(frozen=True)
class Magnitude(Criterion):
    r"""The size of the weight, :math:`|w|^p`.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    Args:
        p: 1 or 2. The same weights go first either way; the two differ where weights are pruned in groups and
            their scores add up.

    Raises:
        ValueError: If ``p`` is neither 1 nor 2.

    Example:
        >>> import torch
        >>> Magnitude().score({"weight": torch.tensor([[-3.0, 1.0]])}).ranked("weight")
        tensor([[3., 1.]])
    """

    p: int = 1

    def __post_init__(self) -> None:
        require_choice("p", self.p, (1, 2))

    @override
    def score(self, weights: Mapping[str, Tensor]) -> Scores:
        return Scores(weights, power=self.p)
