"""One training's worth of pruning, as plain tensor code: the callback tells it when."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_structopt._horizon import Horizon
from lightning_structopt.pruning.criteria import Criterion
from lightning_structopt.pruning.evidence import EvidenceCollector
from lightning_structopt.pruning.guard import ZeroGuard
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.one_shot import advance
from lightning_structopt.pruning.patterns import Pattern
from lightning_structopt.pruning.raw_steps import RawSteps
from lightning_structopt.pruning.regrowth import Regrow, Regrower
from lightning_structopt.pruning.rewinding import Rewind, Rewinder


class PruningRun:
    """The masks of one training with what raises them, what holds them and what goes back in time.

    Args:
        masks: The masks, all ones.
        module: The module whose weights they mask.
        criterion: How important a weight is.
        pattern: Which weights go together.
        rewind: What goes back after each pruning, if anything.
        regrow: How weights are exchanged between prunings, if they are.
    """

    def __init__(
        self,
        masks: MaskSet,
        module: nn.Module,
        criterion: Criterion,
        pattern: Pattern,
        rewind: Rewind | None,
        regrow: Regrow | None,
    ) -> None:
        self.masks = masks
        self.regrower = Regrower(regrow, masks) if regrow is not None else None
        self.rewinder = Rewinder(rewind, module) if rewind is not None else None
        self.guard = ZeroGuard(masks)
        self.collector = EvidenceCollector(criterion, masks.parameters)
        self._module = module
        self._pattern = pattern
        self._asked_for: float | None = None
        self._raw_steps: RawSteps | None = None

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
        """Show the criterion the gradients that ``optimizer`` is about to use, while there is something to score."""
        if self.regrower is None or self.masks.pruned == 0:
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self.collector.observe_gradients(parameters)

    def prune(self, sparsity: float) -> bool:
        """Raise the sparsity to ``sparsity`` and tell whether anything changed."""
        if sparsity == self._asked_for:
            return False  # spare the scoring, which may run a whole calibration set
        self._asked_for = sparsity
        changed = advance(
            self.masks,
            sparsity,
            self.collector.criterion,
            self._pattern,
            lambda: self.collector.evidence(self._module, self.masks.sharding),
        )
        if changed:
            self.collector.forget()
        return changed

    def go_back(self, optimizers: Sequence[Optimizer], now: Horizon) -> None:
        """Rewind what is to be rewound; pruned weights stay zero."""
        if self.rewinder is not None:
            self.rewinder.go_back(optimizers, now)
            self.masks.apply()

    def regrow(
        self, now: int, optimizer: Optimizer, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module]
    ) -> bool:
        """Exchange those weights that ``optimizer`` is about to move, if it is time; tell whether any were."""
        if self.regrower is None:
            return False
        stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        gradients = self.regrower.due(now, stepped)
        if not gradients:
            return False
        self.regrower.exchange(now, gradients, optimizers)
        self.forget_pruned(optimizers, averages)
        return True

    def forget_pruned(self, optimizers: Sequence[Optimizer], averages: Sequence[nn.Module]) -> None:
        """Zero pruned weights wherever else they live: in the state of optimizers and in averaged modules.

        Once there, they stay: an average of zeros is zero, and so is the momentum of zero gradients.
        """
        for optimizer in optimizers:
            self.masks.apply_to_state(optimizer)
        for average in averages:
            self.masks.apply_to_copy(average)

    @property
    def shares_state(self) -> bool:
        """Whether ranks have different parts, so that all must call :meth:`state_dict` together."""
        return self.masks.sharding.mesh is not None or self.collector.shares_state

    def state_dict(self) -> dict[str, Any]:
        """Return everything to go on from, as plain data; all ranks call it together."""
        return {
            "masks": self.masks.pack(),
            "rewinding": None if self.rewinder is None else self.rewinder.state_dict(),
            "evidence": self.collector.state_dict(),
            "regrowth": None if self.regrower is None else self.regrower.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: If it does not fit the module.
        """
        self.masks.unpack(state["masks"])
        if self.rewinder is not None and state["rewinding"] is not None:
            self.rewinder.load_state_dict(state["rewinding"])
        if self.regrower is not None and state.get("regrowth"):
            self.regrower.load_state_dict(state["regrowth"])
        if state["evidence"]:
            self.collector.load_state_dict(state["evidence"])
