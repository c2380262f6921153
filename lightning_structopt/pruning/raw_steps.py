"""Optimizer steps that Lightning does not tell callbacks of."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class RawSteps:
    """Calls ``act`` before those steps for which Lightning's ``on_before_optimizer_step`` does not come.

    Under manual optimization a module may step the optimizers themselves
    (``self.optimizers(use_pl_optimizer=False)``), past Lightning's hooks.

    Args:
        act: What to do with an optimizer when gradients are complete, just before it moves the weights.
    """

    def __init__(self, act: Callable[[Optimizer], None]) -> None:
        self._act = act
        self._announced: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Watch the steps of ``optimizers``."""
        self.detach()
        self._handles = [optimizer.register_step_pre_hook(self._before_step) for optimizer in optimizers]

    def detach(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._announced.clear()

    def announce(self, optimizer: Optimizer) -> None:
        """Say that Lightning's hook came for the step that ``optimizer`` is about to take."""
        self._announced.add(id(optimizer))

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # `args[0]` is the optimizer
        if closure is None:
            return self._act_if_missed(optimizer)

        def closure_and_act() -> Any:  # Lightning's own steps have a closure, and its hook comes within
            loss = closure()
            self._act_if_missed(optimizer)
            return loss

        return (optimizer,), {**kwargs, "closure": closure_and_act}

    def _act_if_missed(self, optimizer: Optimizer) -> None:
        if id(optimizer) in self._announced:
            self._announced.discard(id(optimizer))
        else:
            self._act(optimizer)
