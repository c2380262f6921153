"""Members that add up, each one correcting those before it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt._precision import widened
from lightning_structopt.ensembles.batches import call, tensor_of


def chain(
    members: Sequence[nn.Module], inputs: Any, shrinkage: float, pass_on: bool, trained: int | None = None
) -> list[Tensor]:
    r"""Return what the first 1, 2, ... members add up to, :math:`F_m = F_{m-1} + \nu f_m`, where :math:`F_1 = f_1`.

    Args:
        members: Those to ask, in order.
        inputs: A tensor, a tuple of arguments or a dict of named ones.
        shrinkage: The factor on all but the first.
        pass_on: Whether members after the first are given :math:`F_{m-1}`, as the last argument or as ``before``.
        trained: The index of the one that gradients go through; by default none is kept out.

    Raises:
        ValueError: If outputs differ in shape.

    Example:
        >>> [float(total) for total in chain([nn.Identity(), nn.Identity()], torch.tensor(2.0), 0.5, pass_on=False)]
        [2.0, 3.0]
    """
    totals: list[Tensor] = []
    for index, member in enumerate(members):
        given = _with(inputs, totals[-1].detach()) if totals and pass_on else inputs
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained in {None, index}):
            found = widened(tensor_of(call(member, given)))
        if totals and found.shape != totals[-1].shape:
            raise ValueError(
                f"Members of a chain add up, so they must return outputs of one shape. Found {tuple(totals[-1].shape)} "
                f"of those before member {index}, and {tuple(found.shape)} of that. Bring them to the same shape."
            )
        totals.append(totals[-1] + shrinkage * found if totals else found)
    return totals


def member_in_turn(step: int, steps: int, members: int) -> int:
    """Return which member is trained in ``step``: all get as many of all steps, up to rounding.

    Example:
        >>> [member_in_turn(step, 5, members=2) for step in range(5)]
        [0, 0, 0, 1, 1]
    """
    return min(step * members // steps, members - 1)


def _with(inputs: Any, before: Tensor) -> Any:
    if isinstance(inputs, Mapping):
        return {**inputs, "before": before}
    return (*inputs, before) if isinstance(inputs, tuple) else (inputs, before)
