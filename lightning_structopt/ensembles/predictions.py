"""What members say of data, gathered once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_structopt._devices import device_of, moved
from lightning_structopt._undisturbed import evaluating
from lightning_structopt.ensembles.batches import Read, call, read_pair, require_target, tensor_of, together
from lightning_structopt.ensembles.members import Member, settle


@dataclass(frozen=True)
class Predictions:
    """The outputs of all members for the same samples, on the CPU.

    Args:
        outputs: (M, N, ...), by member and sample.
        target: (N, ...).
    """

    outputs: Tensor
    target: Tensor


@torch.no_grad()
def predictions(members: Sequence[Member], loader: Iterable[Any], read: Read = read_pair) -> Predictions:
    """Run every member over ``loader`` in evaluation mode.

    Args:
        members: As those of :class:`~lightning_structopt.ParallelEnsemble`; modules are left as they were.
        loader: Batches with a target; each goes to the device of the member that is asked.
        read: From a batch to inputs and target.

    Raises:
        TypeError: If a batch has no target, or a member returns no tensor.
        ValueError: If there are no batches, or members' outputs differ in shape.

    Example:
        >>> members = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)]
        >>> predictions(members, [(torch.ones(4, 3), torch.zeros(4))] * 2).outputs.shape
        torch.Size([2, 8, 2])
    """
    modules = settle(members, trained=True)  # so modules are left as they were
    outputs, targets = list[Tensor](), list[Tensor]()
    for batch in loader:
        found = []
        for module in modules:
            device = device_of(module)
            with evaluating(module):
                inputs, target = read(moved(batch, device))
                found.append(tensor_of(call(module, inputs)).float().cpu())
        outputs.append(together(found))
        targets.append(require_target(target).cpu())
    if not outputs:
        raise ValueError("The data must have at least one batch. Found none. Check the loader.")
    return Predictions(torch.cat(outputs, 1), torch.cat(targets))
