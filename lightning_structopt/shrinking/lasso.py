"""A group lasso over channels: all weights of a channel, wherever they are, get smaller together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_structopt._precision import widened
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.structure import Structure


@dataclass(frozen=True, eq=False)
class _Part:
    """What the members of a group have of one parameter.

    Args:
        parameter: The parameter.
        dim: Its dimension of which they have indices.
        indices: These, of shape (members, indices per member).
    """

    parameter: nn.Parameter
    dim: int
    indices: Tensor

    @property
    def weights(self) -> int:
        """The number of weights that a member has here."""
        return self.indices.shape[1] * self.parameter.numel() // self.parameter.shape[self.dim]

    def squares(self) -> Tensor:
        """Return the sum of squares of each member's weights."""
        first = widened(self.parameter.detach()).transpose(0, self.dim)
        return first.reshape(len(first), -1).square().sum(1)[self.indices].sum(1)

    def scale(self, factors: Tensor) -> None:
        """Multiply the weights of each member by its factor."""
        every = factors.new_ones(self.parameter.shape[self.dim])
        every[self.indices] = factors[:, None].expand_as(self.indices)
        shape = [-1 if dim == self.dim else 1 for dim in range(self.parameter.ndim)]
        self.parameter.mul_(every.to(self.parameter.dtype).reshape(shape))


class CoupledLasso:
    r"""Adds :math:`\lambda \sum_m \sqrt{d_m} \lVert w_m \rVert_2` to what is minimized, by its proximal map.

    :math:`w_m` are the :math:`d_m` weights of a channel: the rows that make it, its norm, the columns that read it.
    After each optimizer step they become :math:`w_m \max(0, 1 - a \lambda \sqrt{d_m} / \lVert w_m \rVert)` with the
    learning rate :math:`a`, decoupled from the loss as weight decay is in AdamW. A weight of two channels (a row of
    one, a column of another) gets smaller with both, one after the other.

    Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables" (2006); Fang et al.,
    "DepGraph: Towards Any Structural Pruning" (2023).

    Args:
        structure: The module.
        groups: Its groups that can get smaller.
        strength: The factor :math:`\lambda`, at least 0.
    """

    def __init__(self, structure: Structure, groups: Sequence[ChannelGroup], strength: float) -> None:
        self._strength = strength
        self._handles: list[RemovableHandle] = []
        parameters = dict(structure.module.named_parameters())
        directions = _directions(structure)
        found = (
            [
                _Part(parameters[name], dim, indices.to(parameters[name].device))
                for (name, dim), indices in group.slots.items()
                if name in parameters and (name, dim) not in directions
            ]
            for group in groups
        )
        self._groups = [parts for parts in found if parts]

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Act after each step of ``optimizers``."""
        self.detach()
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def detach(self) -> None:
        """Act no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # of a gradient scaler that skips a fused step
        if found_inf is None or not bool(found_inf):
            self.shrink(_rates(optimizer))

    @torch.no_grad()
    def shrink(self, rates: Mapping[int, float]) -> None:
        """Apply the proximal map once.

        Args:
            rates: The learning rate by the ``id`` of each parameter that was moved. A group goes with the first one
                that it has a part of.
        """
        for parts in self._groups:
            rate = rates.get(id(parts[0].parameter), 0.0)
            if rate:
                lengths = torch.stack([part.squares() for part in parts]).sum(0).sqrt()
                bound = rate * self._strength * sum(part.weights for part in parts) ** 0.5
                factors = (1 - bound / lengths.clamp_min(1e-30)).clamp_min(0)
                for part in parts:
                    part.scale(factors)


def _rates(optimizer: Optimizer) -> dict[int, float]:
    return {
        id(parameter): float(group["lr"])
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    }


def _directions(structure: Structure) -> set[tuple[str, int]]:
    """Return dimensions of what is divided by its own length, so that making it smaller changes nothing."""
    labels = torch.cat([*structure.traced.space.directions, torch.empty(0, dtype=torch.int64)])
    return {
        (origin.name, origin.dim)
        for origin in structure.traced.origins
        if bool(torch.isin(torch.tensor(origin.first), labels))
    }
