"""Which members of the groups go, so that a target is met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_structopt.pruning.criteria import Criterion, Evidence
from lightning_structopt.shrinking.groups import ChannelGroup, Slot

Scope: TypeAlias = Literal["layer", "global"]


@torch.no_grad()
def importance(
    module: nn.Module,
    groups: Sequence[ChannelGroup],
    criterion: Criterion,
    evidence: Evidence | None = None,
) -> list[Tensor]:
    r"""Return the importance of each member of each group: the scores of all its weights, added up.

    :math:`I_m = \sum_{(W, d)} \sum_{i \in m} \sum_j s(W)_{..i..j..}`, over the weights :math:`W` of two or more
    dimensions of which the member has indices along dimension :math:`d`.

    Args:
        module: The module.
        groups: Its groups.
        criterion: How important a weight is.
        evidence: What else is known; of the module alone if not given.
    """
    parameters = scored_parameters(module, groups)
    if not parameters:
        return [torch.zeros(group.size) for group in groups]
    criterion.require(module, parameters)
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    scores = criterion.score(weights, Evidence(module) if evidence is None else evidence)
    sums: dict[Slot, Tensor] = {}
    for name, dim in dict.fromkeys(slot for group in groups for slot in group.slots):
        if name in parameters:
            sums[name, dim] = scores.dense(name).transpose(0, dim).flatten(1).sum(1).cpu()
    return [_member_sums(group, sums) for group in groups]


def scored_parameters(module: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, nn.Parameter]:
    """Return the weights of two or more dimensions that members of the groups have a part of."""
    names = {name for group in groups for name, _ in group.slots}
    return {
        name: each for name, each in module.named_parameters() if name in names and each.ndim > 1
    }  # fmt: skip


def _member_sums(group: ChannelGroup, sums: dict[Slot, Tensor]) -> Tensor:
    total = torch.zeros(group.size)
    for slot, indices in group.slots.items():
        if slot in sums:
            total = total + sums[slot][indices].sum(1)
    return total


@dataclass(frozen=True, eq=False)
class Order:
    """The order in which members go.

    Args:
        groups: The groups.
        ranks: For each group, its members from the least important on.
        sequence: For each removal, the group that it is of.
        round_to: What remains of a group is a multiple of it, or all.
        minimum: How many members of a group remain at least.
    """

    groups: Sequence[ChannelGroup]
    ranks: Sequence[Tensor]
    sequence: Tensor
    round_to: int
    minimum: int

    @classmethod
    def by(
        cls,
        groups: Sequence[ChannelGroup],
        scores: Sequence[Tensor],
        scope: Scope,
        round_to: int,
        minimum: int,
        gone: Sequence[Tensor] | None = None,
    ) -> "Order":
        """Order members by importance.

        Args:
            groups: The groups.
            scores: The importance of their members.
            scope: ``"layer"`` takes the same fraction of each group; ``"global"`` compares members of all groups,
                each relative to the mean of its group.
            round_to: As in the class.
            minimum: As in the class.
            gone: For each group, which members are gone already (bool): they come first.
        """
        if scope == "global":
            scores = [each / each.mean().clamp(min=1e-12) for each in scores]
        if gone is not None:
            scores = [each.masked_fill(out, -torch.inf) for each, out in zip(scores, gone, strict=True)]
        ranks = [each.argsort(stable=True) for each in scores]
        if scope == "layer":
            keys = [(torch.arange(len(each)) + 0.5) / len(each) for each in ranks]
        else:
            keys = [each[rank] for each, rank in zip(scores, ranks, strict=True)]
        owners = [torch.full((len(each),), number) for number, each in enumerate(ranks)]
        order = torch.cat(keys).argsort(stable=True)
        return cls(groups, ranks, torch.cat(owners)[order], round_to, minimum)

    def dropped(self, steps: int) -> Tensor:
        """Return the classes that are gone after some removals."""
        counts = torch.bincount(self.sequence[:steps], minlength=len(self.groups)).tolist()
        gone = [
            group.classes[rank[: group.size - self._left(group.size, group.size - count)]]
            for group, rank, count in zip(self.groups, self.ranks, counts, strict=True)
        ]
        return torch.cat([*gone, torch.empty(0, dtype=torch.int64)])

    def _left(self, size: int, wanted: int) -> int:
        """Round how many are left of a group of ``size``."""
        wanted = max(wanted, self.minimum, 1)
        rounded = max(self.round_to, (wanted + self.round_to // 2) // self.round_to * self.round_to)
        while rounded < self.minimum:
            rounded += self.round_to
        return min(rounded, size)

    def search(self, cost: Callable[[Tensor], float], goal: float, at_most: bool = False) -> Tensor:
        """Return the removals whose cost is nearest to ``goal``.

        Args:
            cost: The cost after removing some classes; it never grows with their number.
            goal: What it shall be.
            at_most: Whether it must not be more.
        """
        low, high = 0, len(self.sequence)
        while low < high:  # the fewest steps that are enough
            middle = (low + high) // 2
            if cost(self.dropped(middle)) <= goal:
                high = middle
            else:
                low = middle + 1
        if at_most:
            return self.dropped(low)
        candidates = [self.dropped(steps) for steps in (low, max(0, low - 1))]
        return min(candidates, key=lambda each: abs(cost(each) - goal))
