"""What an optimizer remembers of a parameter, when channels are there several times."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_structopt.shrinking.optimizer_state import require_shape_of_parameter

# How often the gradient is a factor of what optimizers remember. Others don't change with it.
_ORDERS = {
    **dict.fromkeys(("momentum_buffer", "exp_avg", "grad_avg", "exp_inf", "prev"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "col_var"), 2),
}


def wider_state(
    state: Mapping[str, Any], shape: Sequence[int], copies: Mapping[int, list[int]], read: Sequence[int]
) -> dict[str, Any]:
    r"""Return an optimizer's state of one parameter, as if all its gradients had been those of the wider module.

    Each of :math:`m` copies of a channel gets a gradient of :math:`g / m`, as what reads it is divided by :math:`m`; so
    first moments are divided by :math:`m` and second ones by :math:`m^2`. A weight that reads copies gets the
    gradient that it had.

    Args:
        state: ``optimizer.state[parameter]``; left as it is.
        shape: The parameter's shape before.
        copies: The old index of each new one, along each dimension that grows.
        read: Those of these dimensions along which it reads channels.

    Returns:
        The new state.

    Raises:
        ValueError: If a tensor has another shape, so that nothing says what is what in it.

    Example:
        >>> state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 1)}
        >>> wider_state(state, (2, 1), {0: [0, 0, 1]}, [])["exp_avg"].flatten()
        tensor([0.5000, 0.5000, 1.0000])
    """
    return {key: _wider(key, value, state, shape, copies, read) for key, value in state.items()}


def _wider(
    key: str,
    value: Any,
    state: Mapping[str, Any],
    shape: Sequence[int],
    copies: Mapping[int, list[int]],
    read: Sequence[int],
) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    require_shape_of_parameter(key, value, shape, "grow", "Use another optimizer.")
    # What RMSprop calls so is already divided by the size of gradients.
    order = 0 if key == "momentum_buffer" and "square_avg" in state else _ORDERS.get(key, 0)
    grown = {dim: indices for dim, indices in copies.items() if value.shape[dim] == shape[dim]}
    return wider_values(value, grown, read, order)


def wider_values(
    value: Tensor, copies: Mapping[int, list[int]], read: Sequence[int], order: int = 1
) -> Tensor:
    """Return what belongs to the elements of a parameter, for its copies.

    Args:
        value: Such as a gradient.
        copies: The old index of each new one, along each dimension that grows.
        read: Those of these dimensions along which the parameter reads channels.
        order: How often the gradient is a factor of it.
    """
    for dim, old in copies.items():
        indices = torch.tensor(old, device=value.device)
        value = value.index_select(dim, indices)
        if order and dim not in read:
            value = value / copies_along(dim, indices, value) ** order
    return value


def copies_along(dim: int, indices: Tensor, like: Tensor) -> Tensor:
    """Return how often each index is there, along dimension ``dim`` of a tensor ``like`` the grown one."""
    often = torch.bincount(indices)[indices].to(like.device, like.dtype)
    return often.reshape([-1 if axis == dim else 1 for axis in range(like.ndim)])
