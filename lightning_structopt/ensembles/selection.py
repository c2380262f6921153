"""Which members to take, and how often: greedy selection with replacement."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt.ensembles.batches import Read, read_pair
from lightning_structopt.ensembles.members import Member
from lightning_structopt.ensembles.predictions import predictions
from lightning_structopt.ensembles.scores import Score, signed_score


@dataclass(frozen=True)
class Selection:
    """What :func:`select_greedily` chose.

    Args:
        order: Which candidate was added in each step, as its index; of all bags, one after another.
        weights: For each candidate its share of all additions; they sum to 1.
        scores: What the metric says of the ensemble after each step, in the same order.
    """

    order: tuple[int, ...]
    weights: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """Which candidates were chosen at all."""
        return tuple(index for index, weight in enumerate(self.weights) if weight > 0)

    @property
    def chosen_weights(self) -> tuple[float, ...]:
        """Their weights, for ``ParallelEnsemble([members[i] for i in s.indices], s.chosen_weights)``."""
        return tuple(self.weights[index] for index in self.indices)


def select_greedily(
    members: Sequence[Member],
    loader: Iterable[Any],
    metric: Score,
    *,
    size: int = 50,
    bags: int = 1,
    share: float = 0.5,
    seed: int = 0,
    read: Read = read_pair,
) -> Selection:
    r"""Build an ensemble step by step, each time adding the candidate that helps most, the same one again if need be.

    The score is that of the mean of what is chosen: of probabilities where the target is classes, of values where it
    is numbers. Of the steps those up to the best are kept; where two are as good, the later, as more members err less.
    Of candidates that help alike, the one that was chosen least is added, then the first. Metrics that count only what
    is right tie often, and overfit small data; a likelihood doesn't.

    With ``bags``, this is repeated among a random share of the candidates each time, and the weights are averaged,
    which overfits less where there are many candidates.

    Args:
        members: The candidates, as members of :class:`~lightning_structopt.ParallelEnsemble`, for which the weights
            are.
        loader: Held-out data that no candidate was trained on. All outputs for it are kept in memory.
        metric: A torchmetrics metric, or a function of outputs (N, ...) and target to a number, higher being better.
        size: How many steps to take, at least 1.
        bags: How many times, at least 1.
        share: The share of candidates in a bag where there are several, in (0, 1].
        seed: Of the random choice.
        read: From a batch to inputs and target.

    Returns:
        The order, the weights and the scores.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, or the metric is no number.

    Example:
        >>> members = [torch.nn.Linear(1, 1) for _ in range(3)]
        >>> with torch.no_grad():
        ...     for member, value in zip(members, (0.0, 1.0, 4.0)):
        ...         _ = member.weight.fill_(0), member.bias.fill_(value)
        >>> def closeness(outputs, target):
        ...     return -(outputs - target).abs().mean()
        >>> select_greedily(members, [(torch.ones(1, 1), torch.full((1, 1), 2.0))], closeness).weights
        (0.0, 0.6666666666666666, 0.3333333333333333)

    See Caruana et al., "Ensemble Selection from Libraries of Models", 2004.
    """
    for name, value in (("size", size), ("bags", bags)):
        require_whole(name, value, 1)
    require_in("share", share, 0, 1, closed="right")
    found = predictions(members, loader, read)
    outputs = found.outputs if found.target.is_floating_point() else found.outputs.softmax(2)
    generator = torch.Generator().manual_seed(seed)
    rounds = []
    for _ in range(bags):
        drawn = torch.randperm(len(outputs), generator=generator)
        in_bag = (
            sorted(drawn[: math.ceil(share * len(outputs))].tolist()) if bags > 1 else range(len(outputs))
        )
        rounds.append(_greedy(outputs, found.target, metric, size, list(in_bag)))
    counts = [
        sum(order.count(index) / len(order) for order, _ in rounds) / bags for index in range(len(outputs))
    ]
    return Selection(
        tuple(index for order, _ in rounds for index in order),
        tuple(counts),
        tuple(value for _, scores in rounds for value in scores),
    )


def _greedy(
    outputs: Tensor, target: Tensor, metric: Score, size: int, candidates: list[int]
) -> tuple[list[int], list[float]]:
    order, scores = list[int](), list[float]()
    total = torch.zeros_like(outputs[0])
    for step in range(1, size + 1):
        values = [signed_score(metric, (total + outputs[index]) / step, target) for index in candidates]
        if bad := [c for c, value in zip(candidates, values, strict=True) if math.isnan(value)]:
            raise ValueError(
                f"`metric` must give numbers. Found NaN for candidate {bad[0]} in step {step}. Check its outputs."
            )
        rank = [(value, -order.count(candidate)) for value, candidate in zip(values, candidates, strict=True)]
        best = max(range(len(rank)), key=rank.__getitem__)  # the first of equals
        total += outputs[candidates[best]]
        order.append(candidates[best])
        scores.append(values[best])
    length = len(scores) - scores[::-1].index(max(scores))
    return order[:length], scores[:length]
