"""Pruning channels, heads and neurons of a module now, without a Trainer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt._checks import require_choice, require_type, require_whole
from lightning_structopt.pruning.criteria import Criterion, Magnitude
from lightning_structopt.shrinking.choice import Order, Scope, importance
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.removal import remove
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.same_class import without_hard_coded
from lightning_structopt.shrinking.structure import Structure, structure_of
from lightning_structopt.shrinking.targets import Target

TOLERANCE = 0.02


def prune_channels(
    module: nn.Module,
    target: Target,
    example_input: Any,
    *,
    criterion: Criterion | None = None,
    scope: Scope = "layer",
    round_to: int = 1,
    minimum: int = 1,
    include_normalized: bool = False,
    same_class: bool = False,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Return a smaller module without its least important channels, heads and neurons.

    What depends on each other goes together: rows, norms, the columns that read them. The output keeps its size.
    The result computes what the module would with those set to zero; train it some more.

    Args:
        module: The module; left as it is.
        target: How much to keep: ``FLOPs(0.5)``, ``Parameters(0.3)`` or ``ChannelRatio(0.5)``.
        example_input: What its ``forward`` takes, a tuple for several. Its batch should be of at least 2.
        criterion: How important a weight is; :class:`~lightning_structopt.Magnitude` if not given.
        scope: ``"layer"`` takes the same fraction everywhere; ``"global"`` compares members of all groups, each
            relative to the mean of its group.
        round_to: Keep a multiple of this many of a group, or all, as some hardware likes it.
        minimum: Keep at least this many of each group.
        include_normalized: Take also from what a layer, group or RMS norm reduces over (the residual stream of
            a transformer), so that outputs change more than by what is gone.
        same_class: Leave alone what only the exported graph could do without, sizes being written into code (the
            heads of ``nn.MultiheadAttention``).
        exclude: Globs on names of parameters that keep their shapes.

    Returns:
        The smaller module; of the same class, wherever that is possible.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the module can't be traced, or can't get as small as the target.

    Example:
        >>> from lightning_structopt.shrinking.targets import ChannelRatio
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prune_channels(module, ChannelRatio(0.5), torch.randn(2, 4))[0]
        Linear(in_features=4, out_features=4, bias=True)
    """
    return channel_report(
        module,
        target,
        example_input,
        criterion=criterion,
        scope=scope,
        round_to=round_to,
        minimum=minimum,
        include_normalized=include_normalized,
        same_class=same_class,
        exclude=exclude,
    ).module


def channel_report(
    module: nn.Module,
    target: Target,
    example_input: Any,
    *,
    criterion: Criterion | None = None,
    scope: Scope = "layer",
    round_to: int = 1,
    minimum: int = 1,
    include_normalized: bool = False,
    same_class: bool = False,
    exclude: Sequence[str] = (),
) -> ShrinkReport:
    """Do what :func:`prune_channels` does, with the same arguments, and return also the plan and the reasons.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the module can't be traced, or can't get as small as the target.
    """
    criterion = Magnitude() if criterion is None else criterion
    require_type("target", target, Target)
    require_type("criterion", criterion, Criterion)
    require_choice("scope", scope, ("layer", "global"))
    require_whole("round_to", round_to, 1)
    require_whole("minimum", minimum, 1)
    structure = structure_of(module, example_input, exclude)
    groups = structure.groups(include_normalized)
    if same_class:
        groups = without_hard_coded(structure, groups)
    if not groups:
        raise ValueError(
            "`prune_channels` needs channels that can go. Found none: all reach the output, are excluded, are under "
            "a norm, have sizes that are written into code, or go through operators without a rule. "
            "`shrink_report(...).explain()` says which."
        )
    order = Order.by(groups, importance(module, groups, criterion), scope, round_to, minimum)
    dropped = _chosen(structure, groups, target, order)
    return remove(structure, dropped, include_normalized)


def _chosen(structure: Structure, groups: list[ChannelGroup], target: Target, order: Order) -> Tensor:
    """Return the classes to remove so that the target is met.

    Raises:
        ValueError: If it can't be.
    """
    measure = target.cost(structure, groups)

    def cost(dropped: Tensor) -> int:
        return measure(structure.kept_without(dropped))

    whole = cost(torch.empty(0, dtype=torch.int64))
    least = cost(order.dropped(len(order.sequence)))
    if least > (target.keep + TOLERANCE) * whole:
        raise ValueError(
            f"`{target!r}` must be within reach. Found that {least / whole:.3f} is left at the least. Keep more, or "
            "allow more: a smaller `minimum` or `round_to`, a shorter `exclude`, `include_normalized=True`."
        )
    return order.search(cost, target.keep * whole)
