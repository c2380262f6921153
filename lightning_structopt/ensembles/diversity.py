"""How different members are: an ensemble gains only where they err apart."""

from torch import Tensor


def disagreement(outputs: Tensor) -> Tensor:
    r"""Return for each pair of members the share of samples for which they choose different classes.

    .. math:: d_{ij} = \frac{1}{N} \sum_n [\arg\max z_{in} \neq \arg\max z_{jn}]

    Args:
        outputs: (M, N, C), as ``predictions(members, loader).outputs``.

    Returns:
        (M, M), symmetric, with zeros on the diagonal.

    Raises:
        ValueError: If ``outputs`` has another number of dimensions.

    Example:
        >>> import torch
        >>> outputs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
        >>> disagreement(outputs)
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]])
    """
    if outputs.ndim != 3:
        raise ValueError(
            f"`outputs` must be of shape (members, samples, classes). Found shape {tuple(outputs.shape)}. Take "
            "those of `predictions(members, loader)`."
        )
    chosen = outputs.argmax(2)
    differs: Tensor = chosen[:, None] != chosen[None]
    return differs.float().mean(2)


def error_correlation(outputs: Tensor, target: Tensor) -> Tensor:
    r"""Return for each pair of members the correlation of their errors.

    Of classes an error is 1 where the class is wrong and 0 where it is right; of numbers it is :math:`y_m - y`.

    Args:
        outputs: (M, N, C) for classes, (M, N, ...) for numbers.
        target: (N,) whole numbers for classes, (N, ...) for numbers.

    Returns:
        (M, M), symmetric, in [-1, 1]: at 1 members err alike, and an ensemble of them gains nothing. NaN for a member
        whose error is always the same.

    Raises:
        ValueError: If the shapes don't fit.

    Example:
        >>> import torch
        >>> outputs = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [-1.0, -2.0, -3.0]])
        >>> error_correlation(outputs, torch.zeros(3))[0]
        tensor([ 1.,  1., -1.])
    """
    if target.is_floating_point():
        if outputs[0].numel() != target.numel():
            raise ValueError(
                f"Each member must give a number for each of `target`. Found outputs of shape {tuple(outputs.shape)} "
                f"and a target of shape {tuple(target.shape)}. Take both of `predictions(members, loader)`."
            )
        errors = outputs.double().flatten(1) - target.double().flatten()
    else:
        if outputs.ndim != 3 or outputs.shape[1:2] != target.shape:
            raise ValueError(
                "For classes `outputs` must be of shape (members, samples, classes) and `target` of shape (samples,). "
                f"Found {tuple(outputs.shape)} and {tuple(target.shape)}. Take both of `predictions(members, loader)`."
            )
        errors = (outputs.argmax(2) != target).double()
    centered = errors - errors.mean(1, keepdim=True)
    # A constant error has no deviation; 0/0 says so.
    scaled = centered / centered.norm(dim=1, keepdim=True)
    correlation: Tensor = scaled @ scaled.T
    return correlation.clamp(-1, 1).float()
