"""What was removed, what was left, and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from lightning_structopt.shrinking.plan import ShrinkPlan


@dataclass(frozen=True, eq=False)
class ShrinkReport:
    """A smaller module, and how it came to be.

    Args:
        module: The smaller module.
        plan: How to make it of a fresh one.
        parameters: Their number before and after.
        flops: Floating-point operations for the example input, before and after.
        removed: For each group that got smaller, how many members it had and has.
        kept: Why something can't go, and how many indices of which parameters that is about.
        unknown: Operators without a rule, each with a module that runs it.
        difference: The largest difference between the outputs of the masked and the smaller module, relative to
            the largest output; with ``include_normalized=True`` they differ.
    """

    module: nn.Module
    plan: ShrinkPlan
    parameters: tuple[int, int]
    flops: tuple[int, int]
    removed: Mapping[str, tuple[int, int]]
    kept: Mapping[str, Mapping[str, int]]
    unknown: Mapping[str, str]
    difference: float

    @property
    def form(self) -> str:
        """``"module"`` for a module of the same class, ``"graph"`` for an exported graph."""
        return self.plan.form

    def explain(self) -> str:
        """Say what was removed, what could not be, and why."""
        before, after = self.parameters
        dense, small = self.flops
        lines = [
            f"{before:,} parameters, now {after:,} ({after / max(1, before):.1%}).",
            f"{dense:,} FLOPs, now {small:,} ({small / max(1, dense):.1%}).",
        ]
        if self.form == "graph":
            lines.append(
                "Sizes are written into code, so that this is the exported graph, not the same class."
            )
        lines += [f"{name}: {now} of {size} kept." for name, (size, now) in self.removed.items()]
        lines += [
            f"`{name}` (in `{place}`) has no rule; what enters it is kept."
            for name, place in self.unknown.items()
        ]
        for why, names in self.kept.items():
            some = ", ".join(f"{name} ({count})" for name, count in Counter(names).most_common(3))
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"Kept because of {why}: {some}{more}.")
        return "\n".join(lines)

    @override
    def __str__(self) -> str:
        return self.explain()
