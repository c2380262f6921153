r"""What several outputs say together.

Everywhere: outputs of shape (M, N, ...) by member and sample, weights :math:`w` of shape (M,), or (M, N) where every
sample has its own, that are not negative and sum to 1 over members.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_structopt._precision import widened

Combine: TypeAlias = Literal["probabilities", "logits", "vote", "mean", "median", "gaussian"]
FOR_CLASSES = ("probabilities", "logits", "vote")
_FLOOR = 1e-6  # the share of a class that nobody votes for: its logarithm must be a number
_ROUNDING = 1e-6  # of sums of weights


def combined(how: Combine, outputs: Tensor, weights: Tensor, class_dim: int = 1) -> Tensor:
    """Combine ``outputs`` in one of the ways of this file.

    Args:
        how: For classes ``"probabilities"``, ``"logits"`` or ``"vote"``, for numbers ``"mean"``, ``"median"`` or
            ``"gaussian"``.
        outputs: (M, N, ...), for classes logits or log-probabilities, for ``"gaussian"`` (M, N, ..., 2).
        weights: (M,) or (M, N).
        class_dim: Which dimension of one member's output the classes are in.

    Returns:
        (N, ...): for classes log-probabilities, for numbers values; in at least float32.

    Raises:
        ValueError: If there are fewer than two classes.
    """
    outputs, weights = widened(outputs), _normalized(weights)
    if how == "mean":
        return mean(outputs, weights)
    if how == "median":
        return median(outputs, weights)
    if how == "gaussian":
        return mixture(outputs, weights)
    dim = class_dim if class_dim < 0 else class_dim + 1
    if outputs.ndim < 3 or outputs.shape[dim] < 2:
        raise ValueError(
            f'`combine="{how}"` needs a score for each of two classes or more. Found outputs of shape '
            f'{tuple(outputs.shape[1:])}. Return two columns for a binary task, or give `combine="mean"` for numbers.'
        )
    ways = {"probabilities": log_mean_probability, "logits": mean_logits, "vote": log_votes}
    return ways[how](outputs, weights, dim)


def log_mean_probability(outputs: Tensor, weights: Tensor, dim: int) -> Tensor:
    r"""Return :math:`\log \sum_m w_m \, \mathrm{softmax}(z_m)`.

    Args:
        outputs: (M, N, ...), logits or log-probabilities.
        weights: (M,) or (M, N).
        dim: The dimension of the classes.

    Example:
        >>> logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()
        >>> log_mean_probability(logits, torch.tensor([0.5, 0.5]), dim=2).exp()
        tensor([[0.7000, 0.3000]])
    """
    # The logarithm of 0 has no gradient, and would turn that of the other members into NaN.
    log_weights = _as(weights, outputs).clamp_min(torch.finfo(weights.dtype).tiny).log()
    return (log_weights + outputs.log_softmax(dim)).logsumexp(0)


def mean_logits(outputs: Tensor, weights: Tensor, dim: int) -> Tensor:
    r"""Return :math:`\log \mathrm{softmax}(\sum_m w_m z_m)`, the normalized geometric mean of probabilities."""
    return mean(outputs, weights).log_softmax(dim - 1 if dim > 0 else dim)


def log_votes(outputs: Tensor, weights: Tensor, dim: int) -> Tensor:
    """Return the logarithm of each class's share of the votes, every member voting by its weight.

    A class without votes has a share of one in a million, so that losses of it stay finite. Where a member rates
    two classes alike, and where two classes get as many votes, the first one counts.

    Example:
        >>> votes = torch.tensor([[[2.0, 1.0]], [[0.0, 1.0]], [[0.0, 3.0]]])
        >>> log_votes(votes, torch.full((3,), 1 / 3), dim=2).exp()
        tensor([[0.3333, 0.6667]])
    """
    votes = torch.zeros_like(outputs).scatter(dim, outputs.argmax(dim, keepdim=True), 1)
    return mean(votes, weights).clamp_min(_FLOOR).log().log_softmax(dim - 1 if dim > 0 else dim)


def mean(outputs: Tensor, weights: Tensor) -> Tensor:
    r"""Return :math:`\sum_m w_m y_m`."""
    return (_as(weights, outputs) * outputs).sum(0)


def median(outputs: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted median: half of the weight lies at or below it, and half at or above.

    Where two values halve the weight, it lies in the middle between them, as usual.

    Example:
        >>> median(torch.tensor([[1.0], [2.0], [9.0], [4.0]]), torch.full((4,), 0.25))
        tensor([3.])
    """
    values, order = outputs.sort(dim=0)
    below = _as(weights, outputs).expand_as(outputs).gather(0, order).cumsum(0)
    # The first one that reaches a half, and the first one that passes it; argmax takes the first of equals.
    lower = (below >= 0.5 - _ROUNDING).to(torch.uint8).argmax(0, keepdim=True)
    upper = (below > 0.5 + _ROUNDING).to(torch.uint8).argmax(0, keepdim=True)
    return ((values.gather(0, lower) + values.gather(0, upper)) / 2).squeeze(0)


def mixture(outputs: Tensor, weights: Tensor) -> Tensor:
    r"""Return mean and variance of a mixture of distributions, by the law of total variance.

    .. math:: \bar\mu = \sum_m w_m \mu_m, \qquad
        \bar\sigma^2 = \sum_m w_m \sigma_m^2 + \sum_m w_m (\mu_m - \bar\mu)^2

    Args:
        outputs: (M, N, ..., 2), means and variances.
        weights: (M,) or (M, N).

    Returns:
        (N, ..., 2).

    Example:
        >>> mixture(torch.tensor([[[1.0, 4.0]], [[3.0, 2.0]]]), torch.tensor([0.5, 0.5]))
        tensor([[2., 4.]])
    """
    means, variances = outputs.unbind(-1)
    return torch.stack([mean(means, weights), mean(variances, weights) + variance(means, weights)], dim=-1)


def variance(outputs: Tensor, weights: Tensor) -> Tensor:
    r"""Return how far members are apart, :math:`\sum_m w_m (y_m - \bar y)^2`, (N, ...).

    Example:
        >>> variance(torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5]))
        tensor([1.])
    """
    outputs, weights = widened(outputs), _normalized(weights)
    return mean((outputs - mean(outputs, weights)).square(), weights)


def _normalized(weights: Tensor) -> Tensor:
    """Return weights that sum to 1 again where half precision has rounded them."""
    weights = widened(weights)
    return weights / weights.sum(0)


def _as(weights: Tensor, outputs: Tensor) -> Tensor:
    """Return ``weights`` in a shape that multiplies ``outputs``."""
    return weights.reshape(*weights.shape, *[1] * (outputs.ndim - weights.ndim))
