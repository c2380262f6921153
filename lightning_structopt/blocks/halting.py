"""When to stop: the arithmetic of adaptive computation time and of PonderNet."""

import torch
from torch import Tensor


def act_distribution(halts: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the weights of all steps, how many there were, and the remainder.

    :math:`N = \min\{n : \sum_{i \le n} h_i \ge 1 - \epsilon\}`, or all steps; :math:`R = 1 - \sum_{i < N} h_i`;
    :math:`p_n = h_n` for :math:`n < N`, :math:`p_N = R`, and zero after that. Graves, "Adaptive Computation Time for
    Recurrent Neural Networks", 2016 (https://arxiv.org/abs/1603.08983).

    Args:
        halts: Halting probabilities :math:`h`, of shape (steps, rows).
        epsilon: :math:`\epsilon`, in (0, 1).

    Returns:
        Weights of shape (steps, rows); :math:`N` and :math:`R` of shape (rows,). The latter has a gradient.

    Example:
        >>> weights, steps, remainder = act_distribution(torch.tensor([[0.25], [0.9], [0.5]]), 0.01)
        >>> weights.flatten().tolist(), steps.tolist(), remainder.tolist()
        ([0.25, 0.75, 0.0], [2], [0.75])
    """
    reached = halts.cumsum(0) >= 1 - epsilon
    before = torch.cat([torch.zeros_like(reached[:1]), reached[:-1]])
    last = reached & ~before
    last[-1] |= ~before[-1]
    earlier = halts * (~before & ~last)
    remainder = 1 - earlier.sum(0)
    return earlier + remainder * last, (~before).sum(0), remainder


def ponder_distribution(halts: Tensor) -> Tensor:
    r"""Return the probability to halt at each step, :math:`p_n = \lambda_n \prod_{j<n} (1 - \lambda_j)`.

    The last step takes what is left. Banino, Balaguer and Blundell, "PonderNet: Learning to Ponder", 2021
    (https://arxiv.org/abs/2107.05407).

    Args:
        halts: Halting probabilities :math:`\lambda`, of shape (steps, rows).

    Returns:
        Of shape (steps, rows); sums to 1 over steps.

    Example:
        >>> ponder_distribution(torch.tensor([[0.5], [0.5], [0.1]])).flatten().tolist()
        [0.5, 0.25, 0.25]
    """
    going_on = torch.cat([torch.ones_like(halts[:1]), (1 - halts[:-1]).cumprod(0)])
    return torch.cat([halts[:-1], torch.ones_like(halts[:1])]) * going_on


def kl_to_geometric(probabilities: Tensor, prior: float) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p \,\|\, \mathrm{Geom}(\lambda_p))` of each row; the last step has the prior's tail.

    Args:
        probabilities: Of shape (steps, rows).
        prior: :math:`\lambda_p`, in (0, 1).

    Returns:
        Of shape (rows,), at least 0.

    Example:
        >>> uniform = ponder_distribution(torch.full((4, 1), 0.3))
        >>> bool(kl_to_geometric(uniform, 0.3).abs() < 1e-6)
        True
    """
    expected = ponder_distribution(torch.full_like(probabilities, prior))
    # Where a probability is zero its term is zero; its logarithm must not be asked for.
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return (probabilities * (logs - expected.log())).sum(0)
