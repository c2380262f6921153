"""What holds pruned weights at zero through a training, and what criteria see of it meanwhile."""

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer

from lightning_structopt.pruning.evidence import EvidenceCollector
from lightning_structopt.pruning.guard import ZeroGuard
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.raw_steps import RawSteps


class Holding:
    """The masks of one training with what watches the module and its optimizers for them.

    Args:
        masks: The masks.
        collector: What the criterion sees.
        module: The module whose weights they are.
    """

    def __init__(self, masks: MaskSet, collector: EvidenceCollector, module: nn.Module) -> None:
        self.masks = masks
        self.guard = ZeroGuard(masks)
        self.collector = collector
        self._module = module
        self._raw_steps: RawSteps | None = None

    @property
    def shares_state(self) -> bool:
        """Whether ranks have different parts, so that all must ask for the state together."""
        return self.masks.sharding.mesh is not None or self.collector.shares_state

    def attach(self, optimizers: Sequence[Optimizer], *, gradients_are_final: bool) -> None:
        """Begin to watch the module and its ``optimizers``, as :meth:`ZeroGuard.attach` says.

        Raises:
            ValueError: If the criterion can't score the weights of the module.
        """
        self.collector.attach(self._module)
        self.guard.attach(optimizers, gradients_are_final=gradients_are_final)

    def act_before_raw_steps(self, act: Callable[[Optimizer], None], optimizers: Sequence[Optimizer]) -> None:
        """Call ``act`` before each step of ``optimizers`` that :meth:`announce` did not announce."""
        self._raw_steps = RawSteps(act)
        self._raw_steps.attach(optimizers)

    def announce(self, optimizer: Optimizer) -> None:
        """Say that Lightning's hook came for the step that ``optimizer`` is about to take."""
        if self._raw_steps is not None:
            self._raw_steps.announce(optimizer)

    def detach(self) -> None:
        """Stop watching."""
        if self._raw_steps is not None:
            self._raw_steps.detach()
        self.collector.detach()
        self.guard.detach()

    def observe(self, optimizer: Optimizer) -> None:
        """Show the criterion the gradients that ``optimizer`` is about to use."""
        self.collector.observe_gradients(p for group in optimizer.param_groups for p in group["params"])

    def forget_pruned(self, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module]) -> None:
        """Zero pruned weights wherever else they live: in the state of optimizers and in averaged modules.

        Once there, they stay: an average of zeros is zero, and so is the momentum of zero gradients.
        """
        for optimizer in optimizers:
            self.masks.apply_to_state(optimizer)
        for average in averages:
            self.masks.apply_to_copy(average)
