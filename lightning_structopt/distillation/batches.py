"""How a batch is read: what the teacher is given, and which part of it are the labels."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def default_input(batch: Any) -> Any:
    """Return the teacher's input: a tensor as it is, the first part of a sequence, a mapping whole.

    Args:
        batch: What the student's ``training_step`` is given.

    Raises:
        TypeError: If it is none of these.

    Example:
        >>> default_input((torch.ones(1), torch.zeros(1)))
        tensor([1.])
    """
    if isinstance(batch, (Tensor, Mapping)):
        return batch
    if isinstance(batch, Sequence) and batch:
        return batch[0]
    raise TypeError(
        f"The teacher's input is the first part of a batch. Found a batch of type `{type(batch).__name__}`. Give "
        "`teacher_input`, a function from the batch to the teacher's input."
    )


def default_target(batch: Any) -> Any:
    """Return the labels: the second part of a sequence, or what a mapping calls labels.

    Args:
        batch: What the student's ``training_step`` is given.

    Raises:
        TypeError: If there are none.
    """
    if isinstance(batch, Mapping):
        for name in ("labels", "label", "target", "targets"):
            if name in batch:
                return batch[name]
    elif isinstance(batch, Sequence) and len(batch) > 1:
        return batch[1]
    raise TypeError(
        "A loss needs labels, which are the second part of a batch. Found a batch of type "
        f"`{type(batch).__name__}` without. Give `target`, a function from the batch to the labels."
    )


def call_with(module: torch.nn.Module, inputs: Any) -> Any:
    """Call ``module`` with a tensor, a tuple of arguments or a mapping of named arguments."""
    arguments, named = _arguments(inputs)
    return module(*arguments, **named)


def require_takes(module: torch.nn.Module, inputs: Any) -> None:
    """Raise unless ``forward`` of a teacher takes what :func:`call_with` gives it.

    Args:
        module: The teacher.
        inputs: What was read of a batch.

    Raises:
        TypeError: If it takes other arguments.
    """
    arguments, named = _arguments(inputs)
    try:
        inspect.signature(module.forward).bind(*arguments, **named)
    except TypeError as error:
        given = f"named {sorted(named)}" if named else f"{len(arguments)} in order"
        raise TypeError(
            f"The teacher must take what is read of a batch. Found `{type(module).__name__}.forward` with arguments, "
            f"{given}, that it does not take: {error}. Give `teacher_input`, a function from a batch to a tensor, a "
            "tuple of arguments or a mapping of named ones."
        ) from error


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def with_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """Return ``inputs`` with floating-point tensors of ``dtype``; all else as it is."""
    if isinstance(inputs, Tensor):
        return inputs.to(dtype) if inputs.is_floating_point() else inputs
    if isinstance(inputs, Mapping):
        return {name: with_dtype(value, dtype) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)) and type(inputs) in {tuple, list}:
        return type(inputs)(with_dtype(value, dtype) for value in inputs)
    return inputs
