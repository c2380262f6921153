"""Removing what has no effect."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_structopt._checks import require_type
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.removal import remove
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.same_class import without_hard_coded
from lightning_structopt.shrinking.structure import structure_of


def shrink(
    module: nn.Module,
    example_input: Any,
    plan: ShrinkPlan | None = None,
    *,
    include_normalized: bool = False,
    same_class: bool = False,
    exclude: Sequence[str] = (),
) -> nn.Module:
    """Return a smaller module that computes the same, without the channels, heads and neurons that have no effect.

    A member of a group goes if nothing of it has an effect: the weights that read it are zero, or what makes it
    (rows and bias, or the scale and shift of a norm) is, through activations that leave zero at zero. The
    outputs are compared in evaluation and in training; where they differ, nothing is returned.

    Where sizes are written into code, so that no attribute can tell them, the result is the exported graph with
    the same parameter names, and a warning says so.

    Args:
        module: The module; left as it is.
        example_input: What its ``forward`` takes, a tuple for several. Its batch should be of at least 2.
        plan: What to keep; without it, all that has an effect.
        include_normalized: Remove also what a layer, group or RMS norm or a mean reduces over, so that outputs
            change.
        same_class: Leave alone what only the exported graph could do without, sizes being written into code (the
            heads of ``nn.MultiheadAttention``).
        exclude: Globs on names of parameters that keep their shapes.

    Returns:
        The smaller module; of the same class, wherever that is possible.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the module can't be traced, the plan is for another one, or outputs would differ.

    Example:
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     _ = module[2].weight[:, 3:].zero_()
        >>> shrink(module, torch.randn(2, 4))[0]
        Linear(in_features=4, out_features=3, bias=True)
    """
    if plan is not None:
        require_type("plan", plan, ShrinkPlan)
        if include_normalized or same_class or exclude:
            raise ValueError(
                "A `plan` says all that is removed. Found it with other options. Leave out `include_normalized`, "
                "`same_class` and `exclude`, or the plan."
            )
        return plan.apply(module, example_input)
    report = shrink_report(
        module, example_input, include_normalized=include_normalized, same_class=same_class, exclude=exclude
    )
    return report.module


def shrink_report(
    module: nn.Module,
    example_input: Any,
    *,
    include_normalized: bool = False,
    same_class: bool = False,
    exclude: Sequence[str] = (),
) -> ShrinkReport:
    """Do what :func:`shrink` does, and return also the plan and the reasons.

    Args:
        module: The module; left as it is.
        example_input: What its ``forward`` takes, a tuple for several.
        include_normalized: As in :func:`shrink`.
        same_class: As in :func:`shrink`.
        exclude: As in :func:`shrink`.

    Returns:
        The smaller module, its plan, and what could not go.
    """
    structure = structure_of(module, example_input, exclude)
    groups = [group for group in structure.groups(include_normalized) if bool(group.removable.any())]
    if same_class:
        groups = without_hard_coded(structure, groups)
    dropped = []
    for group in groups:
        useless = group.classes[group.removable]
        dropped.append(useless[1:] if len(useless) == group.size else useless)  # never all of them
    return remove(structure, torch.cat([*dropped, torch.empty(0, dtype=torch.int64)]), include_normalized)
