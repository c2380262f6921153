"""Cheap members first, and the next one only for rows of which the last was not sure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_structopt._precision import widened
from lightning_structopt.ensembles.batches import call, tensor_of


@dataclass(frozen=True)
class Routed:
    """What a cascade answered.

    Args:
        output: (N, C), log-probabilities.
        answered_by: (N,), the index of the member whose answer it is.
        seen: For each member how many rows it ran on.
    """

    output: Tensor
    answered_by: Tensor
    seen: tuple[int, ...]


def cascade(members: Sequence[nn.Module] | nn.ModuleList, inputs: Any, thresholds: Sequence[float]) -> Routed:
    """Ask ``members`` in turn, each one only about the rows that are left, as one smaller batch.

    A row is done where the most probable class has a probability of at least the member's threshold; the last member
    answers all that are left.

    Args:
        members: Classifiers that return logits or log-probabilities, (N, C).
        inputs: A tensor, a tuple of arguments or a dict of named ones; tensors of N rows are cut to those left.
        thresholds: One for each member but the last.

    Raises:
        ValueError: If a member returns something else than one row of classes for each sample.

    Example:
        >>> sure, unsure = nn.Linear(1, 2), nn.Linear(1, 2)
        >>> with torch.no_grad():
        ...     _ = unsure.weight.copy_(torch.tensor([[1.0], [0.0]])), unsure.bias.zero_()
        >>> cascade([unsure, sure], torch.tensor([[0.0], [9.0]]), [0.9]).seen
        (2, 1)
    """
    seen = [0] * len(members)
    output = answered_by = rows = None
    for index, member in enumerate(members):
        found = widened(tensor_of(call(member, inputs))).log_softmax(-1)
        seen[index] = len(found)
        if output is None or answered_by is None or rows is None:
            _require_classes(found, index, found.shape)
            output = found
            answered_by = torch.zeros(len(found), dtype=torch.long, device=found.device)
            rows = torch.arange(len(found), device=found.device)
        else:
            _require_classes(found, index, (len(rows), *output.shape[1:]))
            output, answered_by = output.index_copy(0, rows, found), answered_by.index_fill(0, rows, index)
        if index == len(members) - 1:
            break
        left = (found.amax(1).exp() < thresholds[index]).nonzero().squeeze(1)
        if len(left) == 0:
            break
        if len(left) < len(rows):  # else the batch is as it was
            inputs, rows = _cut(inputs, left, len(rows)), rows[left]
    assert output is not None
    assert answered_by is not None
    return Routed(output, answered_by, tuple(seen))


def _cut(inputs: Any, left: Tensor, count: int) -> Any:
    def rows_of(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == count:
            return value[left]
        return value  # a mask or a table that all rows share

    return tree_map(rows_of, inputs)


def _require_classes(found: Tensor, index: int, shape: Sequence[int]) -> None:
    """Raise unless a member's output is of ``shape``, (N, C).

    Raises:
        ValueError: If it isn't.
    """
    if found.ndim != 2 or found.shape[1] < 2 or tuple(found.shape) != tuple(shape):
        expected = "(samples, classes) with two classes or more" if index == 0 else str(tuple(shape))
        raise ValueError(
            f"Members of a cascade must return one row of the same classes for each sample, of shape {expected}. Found "
            f"{tuple(found.shape)} of member {index}. Wrap it in a module that returns that."
        )
