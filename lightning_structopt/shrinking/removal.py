"""Removing classes of labels from a module, and comparing it with the one in which they are zero."""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt.shrinking.attributes import Edits, candidate_edits, choose_edits
from lightning_structopt.shrinking.costs import flop_count
from lightning_structopt.shrinking.graph_form import smaller_graph
from lightning_structopt.shrinking.groups import Groups
from lightning_structopt.shrinking.literals import changed_literals
from lightning_structopt.shrinking.plan import ShrinkPlan, class_name
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.surgery import set_attributes, sizes_that_tell, smaller_copy
from lightning_structopt.shrinking.tracing import Trace, tensors_of
from lightning_structopt.shrinking.verify import (
    TOLERANCE,
    difference,
    failing_parts,
    largest_difference,
    outputs_of,
    zero_out,
)

Lists = dict[str, dict[int, list[int]]]


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
    keep = torch.ones(traced.space.size, dtype=torch.bool)
    keep[dropped] = False
    kept = keep[structure.found.classes]
    lists = _kept_indices(traced, kept)
    shapes = {name: list(tensor.shape) for name, tensor in tensors_of(module).items() if name in lists}
    masked = copy.deepcopy(module)
    zero_out(masked, _dropped_indices(structure, kept))
    trial = _Trial(structure, masked, lists, changes_outputs)
    edits = choose_edits(module, candidate_edits(module, changed_literals(traced, kept)), trial.works)
    if edits is not None:
        small, attributes = trial.small(edits)
        plan = ShrinkPlan(class_name(module), lists, shapes, attributes)
    else:
        plan = ShrinkPlan(class_name(module), lists, shapes, form="graph")
        warnings.warn(
            f"`{class_name(module)}` has sizes written into its code that no attribute can change"
            f"{trial.reason}. The smaller module is the exported graph, with the same parameter names. To keep the "
            "class, name the parameters of that part in `exclude`.",
            stacklevel=4,
        )
        small = smaller_graph(module, structure.inputs, lists)
    return _report(structure, small, plan, keep, trial.checked(small))


class _Trial:
    """Tries what makes the smaller module work, against the masked one."""

    def __init__(self, structure: Structure, masked: nn.Module, lists: Lists, changes_outputs: bool) -> None:
        self.reason = ""
        self._structure, self._masked, self._lists = structure, masked, lists
        self._changes_outputs = changes_outputs
        self._expected = outputs_of(masked, structure.inputs)

    def small(self, edits: Edits) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
        """Return the smaller module and all attributes that it has of its own."""
        small = smaller_copy(self._structure.module, self._lists)
        set_attributes(small, edits)
        told = sizes_that_tell(small)
        set_attributes(small, told)
        paths = [*edits, *(path for path in told if path not in edits)]
        return small, {path: {**edits.get(path, {}), **told.get(path, {})} for path in paths}

    def works(self, edits: Edits) -> bool | list[str]:
        """Tell whether the smaller module computes the same, or where it failed."""
        small, _ = self.small(edits)
        try:
            found = outputs_of(small, self._structure.inputs)
        except Exception as error:  # whatever the user's code raises when sizes don't fit
            places = failing_parts(small, error)
            self.reason = f" (`{places[0]}`: {str(error).strip().splitlines()[0]})" if places else ""
            return places
        if self._changes_outputs or largest_difference(self._expected, found) <= TOLERANCE:
            return True
        return self._gap(small, self._expected, training=False) <= TOLERANCE

    def _gap(self, small: nn.Module, expected: list[Tensor], training: bool) -> float:
        return difference(self._masked, expected, small, self._structure.inputs, training)

    def checked(self, small: nn.Module) -> float:
        """Return the largest difference in evaluation and training; last, as it changes the masked module.

        Raises:
            ValueError: If outputs differ that should not.
        """
        gap = self._gap(small, self._expected, training=False)
        try:
            expected = outputs_of(self._masked, self._structure.inputs, training=True)
            gap = max(gap, self._gap(small, expected, training=True))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # of a batch norm, in a batch of one
                raise
        if gap > TOLERANCE and not self._changes_outputs:
            raise ValueError(
                "A smaller module must compute what the masked one does. Found outputs that differ by "
                f"{gap:.1e} of the largest. Please report the module; name parameters in `exclude` to go around it."
            )
        return gap


def _kept_indices(traced: Trace, kept: Tensor) -> Lists:
    lists: Lists = {}
    for origin in traced.origins:
        own = kept[origin.first : origin.first + origin.size]
        if not bool(own.all()):
            lists.setdefault(origin.name, {})[origin.dim] = own.nonzero()[:, 0].tolist()
    return lists


def _dropped_indices(structure: Structure, kept: Tensor) -> dict[str, dict[int, Tensor]]:
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
    structure: Structure, small: nn.Module, plan: ShrinkPlan, keep: Tensor, gap: float
) -> ShrinkReport:
    count = tuple(sum(each.numel() for each in m.parameters()) for m in (structure.module, small))
    flops = flop_count(structure.traced)
    left = {group.name: (group.size, int(keep[group.classes].sum())) for group in structure.found.groups}
    return ShrinkReport(
        module=small,
        plan=plan,
        parameters=(count[0], count[1]),
        flops=(flops(torch.ones_like(keep)), flops(keep[structure.found.classes])),
        removed={name: (size, now) for name, (size, now) in left.items() if now < size},
        kept=_reasons(structure.traced, structure.found),
        unknown=structure.traced.unknown,
        difference=gap,
    )


def _reasons(traced: Trace, found: Groups) -> Mapping[str, Mapping[str, int]]:
    """Return for each reason how many indices of which parameters are kept for it."""
    owner = torch.full((traced.space.size,), -1)
    for number, origin in enumerate(traced.origins):
        owner[origin.first : origin.first + origin.size] = number
    reasons: dict[str, Counter[str]] = {}
    for why, labels in found.kept:
        numbers = owner[labels]
        for number in numbers[numbers >= 0].tolist():
            origin = traced.origins[number]
            reasons.setdefault(why, Counter())[f"{origin.name}[{origin.dim}]"] += 1
    return reasons
