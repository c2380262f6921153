"""Thresholds of a cascade for a target accuracy or cost, found on held-out data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GRID = 200  # thresholds tried for a member
_ROUNDS = 4  # of going through all members
_ROUNDING = 1e-9


@dataclass(frozen=True)
class CascadeReport:
    """What thresholds do on the data they were fitted on.

    Args:
        thresholds: One for each member but the last.
        accuracy: The share of right answers, in [0, 1].
        cost: Of a sample on average, as a share of what running all members would cost, in (0, 1].
        executed_fraction: For each member the share of samples it ran on.
    """

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float
    executed_fraction: tuple[float, ...]


@dataclass(frozen=True)
class Evidence:
    """What members say of held-out data.

    Args:
        confidence: (M, N), the probability of each member's class.
        right: (M, N), whether that class is right.
        costs: What running each member costs, as shares of their sum.
    """

    confidence: Tensor
    right: Tensor
    costs: tuple[float, ...]

    def report(self, thresholds: Sequence[float]) -> CascadeReport:
        """Return what a cascade with ``thresholds`` would do."""
        members, samples = self.right.shape
        left = torch.ones(samples, dtype=torch.bool)
        right, executed = 0, []
        for index in range(members):
            executed.append(float(left.double().mean()))
            # As the cascade compares them: numbers of single precision with one of double.
            done = left if index == members - 1 else left & (self.confidence[index] >= thresholds[index])
            right += int((done & self.right[index]).sum())
            left = left & ~done
        cost = sum(share * fraction for share, fraction in zip(self.costs, executed, strict=True))
        return CascadeReport(tuple(thresholds), right / samples, cost, tuple(executed))


def fit_thresholds(
    evidence: Evidence, target_accuracy: float | None = None, target_cost: float | None = None
) -> CascadeReport:
    """Return the cheapest thresholds that reach ``target_accuracy``, or the most accurate ones within ``target_cost``.

    The best threshold that all members share is looked for first, then each is moved while the others stay, as long
    as that helps. With two members it is the best of a grid of their confidences.

    Args:
        evidence: What members say of held-out data.
        target_accuracy: In [0, 1].
        target_cost: In (0, 1].

    Raises:
        ValueError: If no thresholds do.
    """
    stages = len(evidence.right) - 1
    grids = [_grid(confidence) for confidence in evidence.confidence[:stages]]
    value = _value_of(target_accuracy, target_cost)
    shared = [[threshold] * stages for threshold in _grid(evidence.confidence[:stages].flatten())]
    best = max((evidence.report(thresholds) for thresholds in shared), key=value)
    for _ in range(_ROUNDS):
        before = best
        for stage, grid in enumerate(grids):
            for threshold in grid:
                tried = [*best.thresholds[:stage], threshold, *best.thresholds[stage + 1 :]]
                best = max(best, evidence.report(tried), key=value)
        if best == before:
            break
    _require_reached(best, target_accuracy, target_cost)
    return best


def _grid(confidence: Tensor) -> list[float]:
    """Return thresholds that part the samples: 0 for none to be left, 1 for all that aren't certain."""
    shares = torch.linspace(0, 1, min(_GRID, confidence.numel()), dtype=torch.double)
    values = confidence.sort().values[(shares * (confidence.numel() - 1)).round().long()]
    return sorted({0.0, 1.0, *values.clamp(0, 1).tolist()})


def _value_of(
    target_accuracy: float | None, target_cost: float | None
) -> Callable[[CascadeReport], tuple[float, ...]]:
    """Return what to maximize: first how far the target is met, then what is free, then the other."""

    def by_accuracy(report: CascadeReport) -> tuple[float, ...]:
        assert target_accuracy is not None
        missing = max(0.0, target_accuracy - report.accuracy - _ROUNDING)
        return -missing, -report.cost, report.accuracy

    def by_cost(report: CascadeReport) -> tuple[float, ...]:
        assert target_cost is not None
        return -max(0.0, report.cost - target_cost - _ROUNDING), report.accuracy, -report.cost

    return by_cost if target_accuracy is None else by_accuracy


def _require_reached(best: CascadeReport, target_accuracy: float | None, target_cost: float | None) -> None:
    if target_accuracy is not None and best.accuracy < target_accuracy - _ROUNDING:
        raise ValueError(
            f"Thresholds must exist for the target. Found an accuracy of {best.accuracy:.4f} at best, below "
            f"`target_accuracy = {target_accuracy}`. Ask for less, or add a better member at the end."
        )
    if target_cost is not None and best.cost > target_cost + _ROUNDING:
        raise ValueError(
            f"Thresholds must exist for the target. Found a cost of {best.cost:.4f} at least, as all samples run "
            f"through the first member, above `target_cost = {target_cost}`. Ask for more, or put a cheaper one "
            "first."
        )
