"""Pruning channels, heads and neurons of a module now, without a Trainer."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_structopt._checks import require_choice, require_type, require_whole
from lightning_structopt.pruning.criteria import Criterion, Magnitude
from lightning_structopt.shrinking.budget import Budget
from lightning_structopt.shrinking.choice import Order, Scope, importance
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.removal import reasons, remove
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.same_class import without_hard_coded
from lightning_structopt.shrinking.structure import Structure, structure_of
from lightning_structopt.shrinking.targets import Latency, Target
from lightning_structopt.shrinking.timing import time_of, warn_if_missed


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
    same_class: bool | None = None,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Return a smaller module without its least important channels, heads and neurons.

    What depends on each other goes together: rows, norms, the columns that read them. The output keeps its size.
    The result computes what the module would with those set to zero; train it some more.

    Args:
        module: The module; left as it is.
        target: How much to keep: ``FLOPs(0.5)``, ``Parameters(0.3)``, ``ChannelRatio(0.5)``, ``Latency(0.6)`` or
            ``MaxBytes(1_000_000)``.
        example_input: What its ``forward`` takes, a tuple for several. Its batch should be of at least 2.
        criterion: How important a weight is; :class:`~lightning_structopt.Magnitude` if not given.
        scope: ``"layer"`` takes the same fraction everywhere; ``"global"`` compares members of all groups, each
            relative to the mean of its group.
        round_to: Keep a multiple of this many of a group, or all, as some hardware likes it.
        minimum: Keep at least this many of each group.
        include_normalized: Take also from what a layer, group or RMS norm reduces over (the residual stream of
            a transformer), so that outputs change more than by what is gone.
        same_class: Whether to leave alone what only the exported graph could do without, sizes being written into
            code (the heads of ``nn.MultiheadAttention``). None does so wherever the target can be reached like that.
        exclude: Globs on names of parameters that keep their shapes.

    Returns:
        The smaller module; of the same class, wherever that is possible.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the module can't be traced, or can't get as small as the target.

    Example:
        >>> import torch
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
    same_class: bool | None = None,
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

    def chosen(same_class: bool) -> Tensor:
        groups = groups_to_choose_from(structure, include_normalized, same_class)
        order = Order.by(groups, importance(module, groups, criterion), scope, round_to, minimum)
        budget = Budget(structure, groups, target)
        budget.require_reachable(order)
        return budget.choose(order)

    try:
        dropped = chosen(same_class is not False)
    except ValueError:
        if same_class is not None:
            raise
        dropped = chosen(same_class=False)  # the target is out of reach of the same class
    report = remove(structure, dropped, include_normalized)
    if isinstance(target, Latency):
        warn_if_missed(target.keep, *(time_of(each, structure.inputs) for each in (module, report.module)))
    return report


def groups_to_choose_from(
    structure: Structure, include_normalized: bool, same_class: bool
) -> list[ChannelGroup]:
    """Return the groups of which members may go.

    Raises:
        ValueError: If there are none.
    """
    groups = structure.groups(include_normalized)
    if same_class:
        groups = without_hard_coded(structure, groups)
    if not groups:
        raise ValueError(
            f"Pruning channels needs some that can go. Found none, because of {_what_keeps(structure, same_class)}. "
            "Shorten `exclude`, or give `include_normalized=True` or `same_class=False` where that is the reason."
        )
    return groups


def _what_keeps(structure: Structure, same_class: bool) -> str:
    """Say why nothing can go, what keeps the most first."""
    found = sorted(reasons(structure).items(), key=lambda each: -sum(each[1].values()))
    said = [f"{why} (`{next(iter(names))}`)" for why, names in found[:3] if names]
    if any(group.normalized for group in structure.found.groups):
        said.append("norms and means that reduce over channels")
    if same_class and structure.found.groups:
        said.append("sizes that are written into code")
    return "; ".join(said) or "its having no weights"
