"""One training's worth of pruning, as plain tensor code: the callback tells it when."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._horizon import Horizon
from lightning_structopt.pruning.criteria import Criterion
from lightning_structopt.pruning.evidence import EvidenceCollector
from lightning_structopt.pruning.holding import Holding
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.one_shot import advance
from lightning_structopt.pruning.patterns import Pattern
from lightning_structopt.pruning.regrowth import Regrow, Regrower
from lightning_structopt.pruning.rewinding import Rewind, Rewinder


class PruningRun(Holding):
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
        super().__init__(masks, EvidenceCollector(criterion, masks.parameters), module)
        self.regrower = Regrower(regrow, masks) if regrow is not None else None
        self.rewinder = Rewinder(rewind, module) if rewind is not None else None
        self._pattern = pattern
        self._asked_for: float | None = None

    @override
    def observe(self, optimizer: Optimizer) -> None:
        if self.regrower is None or self.masks.pruned == 0:  # else there is nothing left to score
            super().observe(optimizer)

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
