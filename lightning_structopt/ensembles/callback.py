"""Several models from one training run: the learning rate falls in cycles, and each end is kept."""

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from lightning_structopt._checks import require_in, require_lightning, require_whole
from lightning_structopt._dtensors import full, local
from lightning_structopt._horizon import training_horizon
from lightning_structopt._rates import OwnGroupsLR, move, require_free_rates
from lightning_structopt._release import LetsGo
from lightning_structopt.ensembles.parallel import ParallelEnsemble


class SnapshotEnsemble(LetsGo, Callback):
    r"""Lets the learning rate fall along a cosine several times over, and keeps the weights at the end of each cycle.

    .. math:: a_t = a_0 \Big( e + (1 - e)\, \tfrac12 \big(1 + \cos(\pi \, t' / T')\big) \Big)

    with :math:`t'` the optimizer steps since the cycle began and :math:`T'` those of a cycle, an equal share of the
    whole training. Each optimizer gets a ``torch.optim.lr_scheduler.LambdaLR`` among the trainer's schedulers.
    Snapshots are on the CPU, and in checkpoints. Huang et al., "Snapshot Ensembles: Train 1, Get M for Free", 2017
    (https://arxiv.org/abs/1704.00109).

    Args:
        cycles: How many, at least 1.
        minimum: The rate :math:`e` at the end of a cycle, as a share of that at its start, in [0, 1).

    Raises:
        TypeError: If ``cycles`` is not a whole number.
        ValueError: If an argument is out of range. At the start of ``fit``, before the first step: if a scheduler owns
            the rates, there are none, the module optimizes by hand, there are fewer steps than cycles, or another
            callback changes the module's shapes.

    Example:
        >>> snapshots = SnapshotEnsemble(cycles=5)
        >>> pl.Trainer(max_epochs=50, callbacks=[snapshots]).fit(module, data)  # doctest: +SKIP
        >>> ensemble = snapshots.ensemble(MyModule)  # doctest: +SKIP
    """

    def __init__(self, cycles: int = 5, minimum: float = 0.0) -> None:
        require_whole("cycles", cycles, 1)
        require_in("minimum", minimum, 0, 1, closed="left")
        self.cycles = cycles
        self.minimum = minimum
        self.snapshots: list[dict[str, Any]] = []
        self._steps = 0  # of the whole training, unknown until it starts
        self._schedulers: list[LambdaLR] = []

    def factor(self, step: int) -> float:
        """Return what the initial rate is multiplied by after ``step`` optimizer steps."""
        if self._steps == 0:  # whatever the length, it starts at 1
            return 1.0
        cycle = min(step * self.cycles // self._steps, self.cycles - 1)
        start, end = self._ends(cycle), self._ends(cycle + 1)
        over = min(1.0, (step - start) / max(1, end - start))
        return self.minimum + (1 - self.minimum) * (1 + math.cos(math.pi * over)) / 2

    def members(self, factory: Callable[[], nn.Module]) -> list[nn.Module]:
        """Return a module of ``factory`` for each snapshot, in evaluation mode.

        Args:
            factory: Makes a module of the class that was trained, as a class without required arguments does.

        Raises:
            ValueError: If there are no snapshots.
        """
        if not self.snapshots:
            raise ValueError(
                "Members are made of snapshots. Found none. Run `fit` with this callback first, for one cycle at least."
            )
        found = []
        for snapshot in self.snapshots:
            module = factory()
            module.load_state_dict(snapshot)
            found.append(module.eval())
        return found

    def ensemble(self, factory: Callable[[], nn.Module], **options: Any) -> ParallelEnsemble:
        """Return the :class:`~lightning_structopt.ParallelEnsemble` of all snapshots.

        Args:
            factory: Makes a module of the class that was trained.
            **options: For :class:`~lightning_structopt.ParallelEnsemble`.

        Raises:
            ValueError: If there are no snapshots.
        """
        return ParallelEnsemble(self.members(factory), **options)

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("SnapshotEnsemble", trainer, pl_module)
        if stage == "fit" and trainer.global_step == 0:  # else the same trainer goes on
            self.snapshots, self._steps = [], 0

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        require_free_rates("SnapshotEnsemble", trainer)
        _require_automatic(trainer)
        _require_one_shape(trainer)
        self._schedulers = [self._schedule_of(optimizer) for optimizer in trainer.optimizers]
        trainer.strategy.lr_scheduler_configs = [
            LRSchedulerConfig(scheduler, interval="step") for scheduler in self._schedulers
        ]

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not earlier: asking for the horizon loads the data, after which a stateful loader is not restored.
        steps = training_horizon(trainer).steps
        few = steps < self.cycles and not getattr(trainer, "fast_dev_run", False)
        if math.isinf(steps) or few:
            raise ValueError(
                f"Each cycle must have an optimizer step, so training must have a known end and {self.cycles} steps at "
                f"least. Found {steps}. Limit the trainer by `max_epochs` or `max_steps`, or give fewer `cycles`."
            )
        self._steps = int(steps)
        self._follow(trainer)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer)  # Lightning steps schedules by itself, but not always once a step
        taken = len(self.snapshots)
        if taken < self.cycles and trainer.global_step >= self._ends(taken + 1):
            self.snapshots.append(_snapshot(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": list(self.snapshots)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.snapshots = copy.deepcopy(state_dict["snapshots"])

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers and loggers belong to one process and one fit.
        kept = {name: value for name, value in vars(self).items() if name not in {"log", "log_dict"}}
        return {**kept, "_schedulers": []}

    @override
    def __repr__(self) -> str:
        return f"SnapshotEnsemble(cycles={self.cycles}, minimum={self.minimum})"

    def _ends(self, cycles: int) -> int:
        """Return after how many steps so many cycles are over."""
        return -(-cycles * self._steps // self.cycles)

    def _schedule_of(self, optimizer: Optimizer) -> LambdaLR:
        # A plain function, as a LambdaLR saves the attributes of any other callable into the checkpoint. It reads
        # the length late; until training starts only the value at 0 is used.
        return OwnGroupsLR(optimizer, lambda step: self.factor(step))

    def _follow(self, trainer: "pl.Trainer") -> None:
        """Put the schedules where the trainer is, and set the rates that belong there."""
        for scheduler in self._schedulers:
            if scheduler.last_epoch != trainer.global_step:
                move(scheduler, trainer.global_step)

    @override
    def _let_go(self) -> None:
        self._schedulers = []
        super()._let_go()


@torch.no_grad()
def _snapshot(module: nn.Module) -> dict[str, Any]:
    """Return a copy of the state dict on the CPU; all ranks call it."""
    return {
        name: full(local(value), value).detach().cpu().clone()
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for name, value in module.state_dict().items()
    }


def _require_automatic(trainer: Any) -> None:
    """Raise if only the module knows when its optimizers step.

    Raises:
        ValueError: If so.
    """
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(
            "Cycles are counted in optimizer steps that Lightning takes. Found `automatic_optimization = False` in "
            f"`{type(trainer.lightning_module).__name__}`. Leave the optimization to Lightning, or keep snapshots in "
            "the module."
        )


def _require_one_shape(trainer: Any) -> None:
    """Raise if a callback changes the shapes of what is trained.

    Raises:
        ValueError: If one does.
    """
    for callback in trainer.callbacks:
        if getattr(callback, "changes_shapes", False):
            raise ValueError(
                "All snapshots must load into one class. Found `SnapshotEnsemble` with "
                f"`{type(callback).__name__}`, which changes the shapes of the module between them. Train twice; "
                'channels may also be removed in the end: `ChannelPruning(remove="end")`.'
            )
