"""How much each member counts: fixed, learned, or after a metric on held-out data."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_list
from lightning_structopt.ensembles.batches import Read, read_pair
from lightning_structopt.ensembles.members import Member
from lightning_structopt.ensembles.predictions import predictions
from lightning_structopt.ensembles.scores import Score, score

_ROUNDING = 1e-6


class FixedWeights(nn.Module):
    """Weights that stay as they are, saved with the ensemble.

    Args:
        values: One for each member, not negative, with sum 1.
    """

    values: Tensor

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values))

    @override
    def forward(self) -> Tensor:
        return self.values


class LearnedWeights(nn.Module):
    r"""Convex weights to train, :math:`w = \mathrm{softmax}(s)`, all the same at first.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(count))

    @override
    def forward(self) -> Tensor:
        return self.scores.softmax(0)


def weights_for(
    count: int, weights: Sequence[float] | Literal["learned"] | None
) -> FixedWeights | LearnedWeights:
    """Return the weights of ``count`` members.

    Args:
        count: How many members there are.
        weights: A number for each, ``"learned"``, or None for all the same.

    Raises:
        TypeError: If a weight is no number.
        ValueError: If there are more or fewer than members, one is negative, or they don't sum to 1.
    """
    if isinstance(weights, str):
        require_choice("weights", weights, ("learned", None))
        return LearnedWeights(count)
    if weights is None:
        return FixedWeights([1 / count] * count)
    require_list("weights", weights)
    given = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    for weight in given:
        require_in("weights", weight, 0, math.inf, closed="left")
    if len(given) != count:
        raise ValueError(
            f"`weights` must have one for each of {count} members. Found {len(given)}: `weights = {given}`."
        )
    total = math.fsum(given)
    if abs(total - 1) > _ROUNDING:
        raise ValueError(
            f"`weights` must sum to 1. Found `weights = {given}`, which sum to {total:.6g}. Divide them by their sum."
        )
    return FixedWeights([weight / total for weight in given])


def weights_by_metric(
    members: Sequence[Member],
    loader: Iterable[Any],
    metric: Score,
    *,
    sharpness: float = 1.0,
    read: Read = read_pair,
) -> list[float]:
    r"""Return weights in proportion to how good each member is by itself, for ``ParallelEnsemble(weights=...)``.

    .. math:: w_m \propto s_m^{\beta} \quad \text{or, where less is better,} \quad w_m \propto s_m^{-\beta}

    Args:
        members: As those of :class:`~lightning_structopt.ParallelEnsemble`.
        loader: Held-out data that no member was trained on.
        metric: A torchmetrics metric, or a function of outputs (N, ...) and target to a number, higher being better.
        sharpness: The exponent :math:`\beta`, in [0, inf): 0 weighs all alike, large ones the best alone.
        read: From a batch to inputs and target.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``sharpness`` is out of range, or a score is negative, no number, or none is above 0.

    Example:
        >>> good, bad = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> with torch.no_grad():
        ...     for member, bias in ((good, [9.0, 0.0]), (bad, [0.0, 9.0])):
        ...         _ = member.weight.zero_(), member.bias.copy_(torch.tensor(bias))
        >>> data = [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
        >>> weights_by_metric([good, bad], data, lambda outputs, target: (outputs.argmax(1) == target).float().mean())
        [0.75, 0.25]
    """
    require_in("sharpness", sharpness, 0, math.inf, closed="left")
    found = predictions(members, loader, read)
    scores = [score(metric, outputs, found.target) for outputs in found.outputs]
    values = [abs(value) for value, _ in scores]
    lower_is_better = not scores[0][1]
    if any(math.isnan(value) or value < 0 for value, _ in scores) or not any(values):
        raise ValueError(
            f"Weights need scores that aren't negative, and one above 0. Found {[value for value, _ in scores]}. Give "
            "a metric such as accuracy or the mean squared error."
        )
    if lower_is_better and not all(values):  # nothing is better than no error at all
        shares = [float(value == 0) for value in values]
    else:
        best = min(values) if lower_is_better else max(values)  # so that no power overflows
        shares = [(value / best) ** (-sharpness if lower_is_better else sharpness) for value in values]
    return [share / math.fsum(shares) for share in shares]
