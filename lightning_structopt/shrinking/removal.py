"""Removing classes of labels from a module, and comparing it with the one in which they are zero."""

import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_structopt.shrinking.copies import copied
from lightning_structopt.shrinking.costs import flop_count
from lightning_structopt.shrinking.graph_form import smaller_graph
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.saved_plan import class_name
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.tracing import tensors_of
from lightning_structopt.shrinking.trial import Trial, kept_indices
from lightning_structopt.shrinking.verify import zero_out


def remove(structure: Structure, dropped: Tensor, changes_outputs: bool = False) -> ShrinkReport:
    """Remove classes of labels, and compare the result with the module in which they are zero.

    Args:
        structure: The module.
        dropped: The classes to remove.
        changes_outputs: Whether a difference is expected.

    Raises:
        ValueError: If outputs would differ.
    """
    module, traced = structure.module, structure.traced
    kept = structure.kept_without(dropped)
    lists = kept_indices(traced, kept)
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(module).items() if name in lists}
    masked = copied(module)
    zero_out(masked, dropped_indices(structure, kept))
    trial = Trial(structure, masked, lists, changes_outputs)
    edits = trial.choose(kept)
    if edits is not None:
        small, attributes = trial.small(edits)
        plan = ShrinkPlan(class_name(module), lists, shapes, attributes)
    else:
        plan = ShrinkPlan(class_name(module), lists, shapes, form="graph")
        warnings.warn(
            f"`{class_name(module)}` has sizes written into its code that no attribute can change"
            f"{trial.reason}. The smaller module is the exported graph, with the same parameter names. "
            "`same_class=True` leaves such parts as they are.",
            stacklevel=4,
        )
        small = smaller_graph(module, structure.inputs, lists)
    return _report(structure, small, plan, kept, trial.checked(small))


def dropped_indices(structure: Structure, kept: Tensor) -> dict[str, dict[int, Tensor]]:
    """Return which indices of parameters to zero: not of directions, which are divided by their length."""
    own = kept.clone()
    for labels in structure.traced.space.directions:
        own[labels] = True
    parameters = {name for name, _ in structure.module.named_parameters()}
    dropped: dict[str, dict[int, Tensor]] = {}
    for origin in structure.traced.origins:
        gone = ~own[origin.first : origin.first + origin.size]
        if origin.name in parameters and bool(gone.any()):
            dropped.setdefault(origin.name, {})[origin.dim] = gone.nonzero()[:, 0]
    return dropped


def _report(
    structure: Structure, small: nn.Module, plan: ShrinkPlan, kept: Tensor, gap: float
) -> ShrinkReport:
    count = tuple(sum(each.numel() for each in m.parameters()) for m in (structure.module, small))
    flops = flop_count(structure.traced)
    left = {group.name: (group.size, int(kept[group.classes].sum())) for group in structure.found.groups}
    return ShrinkReport(
        module=small,
        plan=plan,
        parameters=(count[0], count[1]),
        flops=(flops(torch.ones_like(kept)), flops(kept)),
        removed={name: (size, now) for name, (size, now) in left.items() if now < size},
        kept=reasons(structure),
        unknown=structure.traced.unknown,
        difference=gap,
    )


def reasons(structure: Structure) -> Mapping[str, Mapping[str, int]]:
    """Return for each reason how many indices of which parameters are kept for it."""
    traced = structure.traced
    owner = torch.full((traced.space.size,), -1)
    for number, origin in enumerate(traced.origins):
        owner[origin.first : origin.first + origin.size] = number
    found: dict[str, Counter[str]] = {}
    for why, labels in structure.found.kept:
        numbers = owner[labels]
        for number in numbers[numbers >= 0].tolist():
            origin = traced.origins[number]
            found.setdefault(why, Counter())[f"{origin.name}[{origin.dim}]"] += 1
    return found
