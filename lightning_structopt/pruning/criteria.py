"""How important a weight is: what every criterion gets and returns, and magnitude."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice
from lightning_structopt._dtensors import full, part_of
from lightning_structopt._precision import widened
from lightning_structopt.pruning.sharding import WHOLE, Sharding


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
        values = widened(self.values[name])
        return values if self.power is None else values.abs() ** self.power


@dataclass(frozen=True)
class Evidence:
    """What is known besides the weights when they are scored.

    Args:
        module: The module that holds the weights.
        totals: What a criterion that learns from training has added up, by parameter name.
        steps: How many optimizer steps or forward passes went into each total.
        sharding: Which parameters this rank holds a part of; their weights and totals are those parts.
        group: Ranks that see data of their own and score together; None if this process decides alone.
    """

    module: nn.Module | None = None
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    sharding: Sharding = WHOLE
    group: dist.ProcessGroup | None = None

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of that name."""
        return self.root().get_parameter(name)

    def root(self) -> nn.Module:
        """Return the module.

        Raises:
            ValueError: If there is none.
        """
        if self.module is None:
            raise ValueError(
                "This criterion looks at the module. Found none. Give `score` an `Evidence(module=module)`."
            )
        return self.module

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Put the parts of a parameter-shaped tensor together; all ranks call it."""
        return full(part, self.parameter(name)) if name in self.sharding.sharded else part

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of a parameter-shaped tensor, the inverse of :meth:`whole`."""
        return part_of(whole, self.parameter(name)) if name in self.sharding.sharded else whole

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of ``tensor`` over the ranks of ``group``; itself without one."""
        if self.group is None:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def count_over_ranks(self, number: int) -> int:
        """Return the sum of ``number`` over the ranks of ``group``."""
        device = next((parameter.device for parameter in self.root().parameters()), torch.device("cpu"))
        return int(self.sum_over_ranks(torch.tensor(number, device=device)))


NOTHING = Evidence()


class Criterion(ABC):
    """A rule that gives every weight a score; the lowest are pruned first."""

    @abstractmethod
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        """Score ``weights``.

        Args:
            weights: The weights by parameter name, of any shape; of a sharded one, this rank's part. Not
                modified.
            evidence: What else is known.

        Returns:
            A score for every weight. It may share memory with ``weights`` and ``evidence``.
        """

    def require(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027 (most need nothing)
        """Raise before training if the criterion can't score ``parameters`` of ``module``.

        Raises:
            ValueError: If it can't.
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
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        return Scores(weights, power=self.p)
