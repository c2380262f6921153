"""Everything that channel pruning finds out before the first step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_structopt.pruning.criteria import Criterion
from lightning_structopt.pruning.rewinding import Rewind
from lightning_structopt.shrinking.budget import Budget
from lightning_structopt.shrinking.channels import groups_to_choose_from
from lightning_structopt.shrinking.choice import Order
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.run import ChannelRun, Limits
from lightning_structopt.shrinking.structure import Structure, structure_of
from lightning_structopt.shrinking.targets import FLOPs, Latency, Target


def prepared(
    module: nn.Module,
    inputs: tuple[Any, ...],
    exclude: Sequence[str],
    target: Target,
    criterion: Criterion,
    limits: Limits,
    lasso: float,
    rewind: Rewind | None,
    known_flops: float | None,
    strategy: Any,
) -> tuple[ChannelRun, float | None]:
    """Trace ``module``, and remove channels from a copy to see that it works.

    Args:
        module: The module that is trained.
        inputs: The arguments of its ``forward``.
        exclude: Globs on names of parameters that keep their shapes.
        target: How small it shall get.
        criterion: How important a weight is.
        limits: What restricts the choice.
        lasso: The strength of a group lasso over channels.
        rewind: What goes back after each pruning, if anything.
        known_flops: The fraction of FLOPs that a target of latency was found to be, in the run that goes on.
        strategy: Lightning's, which tells all ranks what the first one timed.

    Returns:
        What prunes, and the fraction of FLOPs that a target of latency was found to be.

    Raises:
        ValueError: If it doesn't work.
    """
    structure = structure_of(module, inputs, exclude)
    groups = groups_to_choose_from(structure, limits.include_normalized, same_class=True)
    flops = known_flops
    if isinstance(target, Latency):
        if flops is None:
            flops = float(strategy.broadcast(flops_for(structure, groups, target, limits)))
        target = FLOPs(flops)
    run = ChannelRun(structure, groups, target, criterion, limits, lasso, rewind)
    run.rehearse()
    return run, flops


def flops_for(structure: Structure, groups: list[ChannelGroup], target: Latency, limits: Limits) -> float:
    """Return the fraction of FLOPs at which a module takes as long as it shall.

    A ramp takes many steps, and all ranks the same ones, so that time is asked once and operations are counted
    from then on.

    Raises:
        ValueError: If the target is out of reach.
    """
    zeros = [torch.zeros(group.size) for group in groups]
    order = Order.by(groups, zeros, limits.scope, limits.round_to, limits.minimum)
    budget = Budget(structure, groups, target)
    budget.require_reachable(order)
    return Budget(structure, groups, FLOPs(1.0)).left(budget.choose(order))
