"""Zero stays zero: what holds pruned weights at zero through every kind of optimizer step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_structopt.pruning.masks import MaskSet

# With weight, gradient and state all zero, the update of these is zero, weight decay included (a test tries
# each). Others, such as Muon, which orthogonalizes, or a third party's, get their weights masked afterwards.
_LEAVES_ZEROS_ALONE = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
}


class ZeroGuard:
    """Holds the weights that ``masks`` prune at zero while optimizers step.

    One pass over memory a step: the weights are masked after it. Where gradients are clipped they are masked
    before it instead, so that dead weights don't count in the norm; for most optimizers that is enough, as
    momentum and decay of a dead weight are zero as well, or are made so when masking gradients begins: a run that
    did not clip may go on as one that does.

    Args:
        masks: What to hold. They may change between steps.
    """

    def __init__(self, masks: MaskSet) -> None:
        self.masks = masks
        self._gradients_are_final = True
        self._masked: set[int] = set()
        self._forgetful: set[int] = set()  # optimizers that remember nothing of dead weights
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizers: Sequence[Optimizer], *, gradients_are_final: bool = True) -> None:
        """Watch the steps of ``optimizers``.

        Args:
            optimizers: Those that move the weights.
            gradients_are_final: Whether nothing changes gradients between :meth:`mask_gradients` and the step.
        """
        self.detach()
        self._forgetful.clear()
        self._gradients_are_final = gradients_are_final
        self._handles = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]

    def detach(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def mask_gradients(self, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights; call it just before ``optimizer`` clips and steps."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        all_masked = self.masks.apply_to_gradients(parameters)
        if all_masked and self._gradients_are_final and type(optimizer) in _LEAVES_ZEROS_ALONE:
            self._forget(optimizer)
            self._masked.add(id(optimizer))

    def _forget(self, optimizer: Optimizer) -> None:
        """Zero momentum that unmasked gradients, or another run's, have left to dead weights."""
        if id(optimizer) not in self._forgetful:
            self._forgetful.add(id(optimizer))
            if self.masks.remembered_by(optimizer):
                self.masks.apply_to_state(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._masked:
            self._masked.discard(id(optimizer))
        else:
            self._forgetful.discard(id(optimizer))
            self.masks.apply()
        self.masks.refresh_state(optimizer)
