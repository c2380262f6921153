"""What an optimizer remembers of a parameter, for the part of it that is kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def smaller_state(
    state: Mapping[str, Any], shape: Sequence[int], kept: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Return an optimizer's state of one parameter without what is not kept of it; of the rest, bit for bit.

    Tensors of the parameter's shape are cut as the parameter is; so are those that have one row or column for all
    (factored second moments), along their other dimensions. Numbers stay as they are.

    Args:
        state: ``optimizer.state[parameter]``; left as it is.
        shape: The parameter's shape before.
        kept: The indices that are kept, along each dimension that gets smaller.

    Returns:
        The new state.

    Raises:
        ValueError: If a tensor has another shape, so that nothing says what is what in it.

    Example:
        >>> state = {"step": torch.tensor(3.0), "exp_avg": torch.arange(6.0).reshape(2, 3)}
        >>> smaller_state(state, (2, 3), {1: [0, 2]})["exp_avg"]
        tensor([[0., 2.],
                [3., 5.]])
    """
    return {key: _smaller(key, value, shape, kept) for key, value in state.items()}


def _smaller(key: str, value: Any, shape: Sequence[int], kept: Mapping[int, Sequence[int]]) -> Any:
    if not isinstance(value, Tensor) or value.numel() == 1:
        return value
    require_shape_of_parameter(key, value, shape, "be cut", 'Use another optimizer, or `remove="end"`.')
    for dim, indices in kept.items():
        if value.shape[dim] == shape[dim]:
            value = value.index_select(dim, torch.tensor(list(indices), device=value.device))
    return value


def require_shape_of_parameter(key: str, value: Tensor, shape: Sequence[int], to: str, remedy: str) -> None:
    """Raise unless each dimension of ``value`` is that of its parameter, or one for all.

    Args:
        key: What the optimizer calls it.
        value: What it remembers.
        shape: The parameter's shape.
        to: What the parameter is about to do.
        remedy: What to do about it.

    Raises:
        ValueError: If it has another shape, so that nothing says what is what in it.
    """
    sizes = list(zip(value.shape, shape, strict=False))
    if value.ndim != len(shape) or any(mine not in {1, whole} for mine, whole in sizes):
        raise ValueError(
            f"What an optimizer remembers of a parameter must have its shape to {to} with it. Found "
            f"`{key}` of shape {tuple(value.shape)} for a parameter of shape {tuple(shape)}. {remedy}"
        )
