"""Gates: who decides, how a decision is trained, and how many of them may be yes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_type, require_whole
from lightning_structopt._precision import widened


class Gate(nn.Module):
    r"""One logit a sample, from the mean of its features: :math:`w_2 \cdot \mathrm{relu}(W_1 \bar x) + b`.

    Args:
        features: Channels of the inputs.
        hidden: Width of the hidden layer.
        opening: The probability to be open, before training, in (0, 1).
        dim: The dimension of the channels: 1 for (batch, channels, ...), -1 for (batch, tokens, channels). The mean
            goes over all others but the first.

    Raises:
        TypeError: If a number is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> Gate(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2])
    """

    def __init__(self, features: int, hidden: int = 16, *, opening: float = 0.85, dim: int = 1) -> None:
        super().__init__()
        require_whole("features", features, 1)
        require_whole("hidden", hidden, 1)
        require_in("opening", opening, 0, 1, closed="neither")
        require_type("dim", dim, int)
        self.dim = dim
        self.net = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        last = self.net[2]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=1e-2)
        nn.init.constant_(last.bias, math.log(opening / (1 - opening)))

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        others = [dim for dim in range(1, inputs.ndim) if dim != self.dim % inputs.ndim]
        means = inputs.mean(others) if others else inputs
        logits: Tensor = self.net(means)
        return logits.squeeze(-1)


class Relaxation(ABC):
    """How decisions that are yes or no get gradients in training."""

    @abstractmethod
    def __call__(self, logits: Tensor, passes: Tensor) -> Tensor:
        """Return gates in [0, 1] with gradients.

        Args:
            logits: In at least float32.
            passes: How many training passes there were before.
        """


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    r"""Hard gates from Gumbel noise, with the gradients of soft ones.

    :math:`\tilde g = \sigma((l + G_1 - G_0) / \tau)`, :math:`g = 1[\tilde g \ge 1/2]` forward and
    :math:`\tilde g` backward. The difference of two Gumbel variables is logistic.

    Jang, Gu and Poole, "Categorical Reparameterization with Gumbel-Softmax", 2017
    (https://arxiv.org/abs/1611.01144); Veit and Belongie, "Convolutional Networks with Adaptive Inference Graphs",
    2018 (https://arxiv.org/abs/1711.11503).

    Args:
        temperature: :math:`\tau`, in (0, inf).

    Raises:
        ValueError: If ``temperature`` is not positive.

    Example:
        >>> StraightThrough()(torch.tensor([-50.0, 50.0]), torch.tensor(0))
        tensor([0., 1.])
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_in("temperature", self.temperature, 0, math.inf, closed="neither")

    @override
    def __call__(self, logits: Tensor, passes: Tensor) -> Tensor:
        tiny = torch.finfo(logits.dtype).tiny
        uniform = torch.rand_like(logits).clamp(tiny, 1 - torch.finfo(logits.dtype).eps)
        soft = torch.sigmoid((logits + torch.logit(uniform)) / self.temperature)
        hard = (soft >= 0.5).to(soft.dtype)
        return hard + (soft - soft.detach())  # exactly hard: the bracket is exactly zero


@dataclass(frozen=True)
class Annealed(Relaxation):
    r"""Soft gates that harden, :math:`g = \sigma(l / \tau_t)` with :math:`\tau_t` falling geometrically, without noise.

    Args:
        start: The first temperature, in (0, inf).
        end: The last one, in (0, ``start``].
        steps: After how many training passes it is reached.

    Raises:
        TypeError: If ``steps`` is not a whole number.
        ValueError: If an argument is out of range.

    Example:
        >>> Annealed(1.0, 0.01, steps=10)(torch.tensor([0.1]), torch.tensor(10)).round(decimals=3)
        tensor([1.])
    """

    start: float = 1.0
    end: float = 0.05
    steps: int = 1000

    def __post_init__(self) -> None:
        require_in("start", self.start, 0, math.inf, closed="neither")
        require_in("end", self.end, 0, self.start, closed="right")
        require_whole("steps", self.steps, 1)

    @override
    def __call__(self, logits: Tensor, passes: Tensor) -> Tensor:
        progress = (passes.to(logits.dtype) / self.steps).clamp(max=1)
        temperature = self.start * (self.end / self.start) ** progress
        return torch.sigmoid(logits / temperature)


@dataclass(frozen=True)
class GateBudget:
    r"""What it costs to be open more or less often than wanted, :math:`\lambda (\bar g - t)^2`.

    Given to a ``GatedBlock`` it holds for that block, as in Veit and Belongie, 2018
    (https://arxiv.org/abs/1711.11503); given to :func:`~lightning_structopt.blocks.auxiliary_loss` it holds for the
    cost of all blocks together, which may then share it out unevenly. It holds for the gates of training: those of
    evaluation, without noise, come near it as training makes gates sure. ``AdaptiveReport`` shows both.

    Args:
        target: The share :math:`t` of rows, or of costs, in [0, 1].
        strength: :math:`\lambda`, in (0, inf).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> GateBudget(0.5, strength=2.0).penalty(torch.tensor([1.0, 0.5]), [1.0, 3.0])
        tensor(0.0312)
    """

    target: float = 0.6
    strength: float = 1.0

    def __post_init__(self) -> None:
        require_in("target", self.target, 0, 1)
        require_in("strength", self.strength, 0, math.inf, closed="neither")

    def penalty(self, shares: Tensor, costs: Sequence[float]) -> Tensor:
        """Return the penalty.

        Args:
            shares: Of rows that each block ran on, of shape (blocks,), in [0, 1].
            costs: What each block costs, in any unit.

        Returns:
            A scalar.
        """
        weights = torch.tensor(list(costs), dtype=torch.float64)
        weights = (weights / weights.sum()).to(shares)
        return self.strength * ((weights * widened(shares)).sum() - self.target) ** 2
