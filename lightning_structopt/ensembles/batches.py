"""What members are called with, and what they return."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Read: TypeAlias = Callable[[Any], tuple[Any, Any]]


def read_pair(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the target of a batch: of a pair both; of a tensor or a single one no target.

    Raises:
        TypeError: If the batch is something else.

    Example:
        >>> read_pair([torch.ones(2), torch.zeros(2)])
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in {1, 2}:
        return batch[0], batch[1] if len(batch) == 2 else None
    raise TypeError(
        f"A batch must be a pair of inputs and target. Found a `{type(batch).__name__}`. Give `read`, a function from "
        "the batch to both; inputs may be a tensor, a tuple of arguments or a dict of named ones."
    )


def require_target(target: Any) -> Tensor:
    """Return ``target``.

    Raises:
        TypeError: If there is none.
    """
    if not isinstance(target, Tensor):
        raise TypeError(
            f"Training and scoring need a target. Found a batch with `{target!r}` for it. Give batches that are pairs "
            "of inputs and target, or `read`, a function from the batch to both."
        )
    return target


def call(module: nn.Module, inputs: Any) -> Any:
    """Call ``module`` with a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def as_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what :func:`call` takes for these arguments.

    Raises:
        TypeError: If some are positional and some named.
    """
    if args and kwargs:
        raise TypeError(
            f"An ensemble is called with positional arguments or with named ones. Found {len(args)} and "
            f"{', '.join(kwargs)}. Name all of them."
        )
    if kwargs:
        return dict(kwargs)
    return args[0] if len(args) == 1 else args


def tensor_of(output: Any) -> Tensor:
    """Return the tensor that a member put out, which may lie in ``logits``.

    Raises:
        TypeError: If there is none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        raise TypeError(
            "A member must return a tensor, or something whose `logits` are one. Found a "
            f"`{type(output).__name__}`. Wrap the member in a module that returns its tensor."
        )
    return found


def mean_and_variance_of(output: Any) -> Tensor:
    """Return the mean and the variance that a member put out, side by side in a last dimension.

    Raises:
        TypeError: If the output is neither a pair of tensors of one shape nor a tensor with these two.

    Example:
        >>> mean_and_variance_of((torch.zeros(4), torch.ones(4))).shape
        torch.Size([4, 2])
    """
    if isinstance(output, (tuple, list)) and len(output) == 2:
        mean, variance = output
        if isinstance(mean, Tensor) and isinstance(variance, Tensor) and mean.shape == variance.shape:
            return torch.stack([mean, variance], dim=-1)
    if isinstance(output, Tensor) and output.ndim > 1 and output.shape[-1] == 2:
        return output
    found = f"a `{type(output).__name__}`"
    if isinstance(output, Tensor):
        found = f"a tensor of shape {tuple(output.shape)}"
    raise TypeError(
        'With `combine="gaussian"` a member must return a mean and a variance: a pair of tensors of one shape, or a '
        f'tensor with both in its last dimension. Found {found}. Give `combine="mean"` for members without a variance.'
    )


def together(outputs: Sequence[Tensor]) -> Tensor:
    """Return the outputs of all members as one tensor, (members, ...).

    Raises:
        ValueError: If their shapes differ.
    """
    shapes = [tuple(output.shape) for output in outputs]
    if len(set(shapes)) > 1:
        found = ", ".join(f"{shape} of member {index}" for index, shape in enumerate(shapes))
        raise ValueError(
            f"Members must return outputs of one shape, with the same classes in the same order. Found {found}. Wrap "
            "those that differ in a module that brings them to the same classes."
        )
    return torch.stack(list(outputs))
