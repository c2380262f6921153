"""The learning rate decays along a schedule, with no change to ``configure_optimizers``."""

import math
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_lightning, require_type, require_whole
from lightning_structopt._horizon import Horizon, training_horizon
from lightning_structopt._rates import OwnGroupsLR, move, require_free_rates
from lightning_structopt._release import LetsGo
from lightning_structopt.pruning.rewinding import TrainsInRounds
from lightning_structopt.schedules import Schedule


class LRDecay(LetsGo, Callback):
    r"""Multiplies the learning rates by a schedule of training progress, :math:`a_t = a_0\, s(t, T)`.

    Each optimizer gets a ``torch.optim.lr_scheduler.LambdaLR`` among the trainer's schedulers, so
    ``LearningRateMonitor`` and checkpoints work as if ``configure_optimizers`` had returned it. Parameter
    groups keep their own initial rates; groups that a callback adds later (``BackboneFinetuning``) keep the rates
    that it gives them. The position :math:`t` is the trainer's own, in optimizer steps (not
    batches) or epochs, also after a resume and in a second ``fit`` of the same trainer.

    Under manual optimization every optimizer counts its own steps. How many there will be only the module
    knows, so ``interval="step"`` with a schedule that needs a horizon then needs ``horizon``, too.

    Args:
        schedule: The factor :math:`s` on the initial rates.
        interval: What :math:`t` and :math:`T` count: optimizer steps or epochs.
        horizon: The length :math:`T` in units of ``interval``, at least 1; by default the whole training.

    Raises:
        TypeError: If ``schedule`` is not a schedule or ``horizon`` not a whole number.
        ValueError: If ``interval`` or ``horizon`` is out of range. At the start of ``fit``, before the first
            step: if two callbacks or a scheduler of the module own the rates, there are no rates, or the
            schedule needs a horizon and there is none.

    Example:
        >>> from lightning_structopt.schedules import Exponential
        >>> LRDecay(Exponential(gamma=0.95), interval="epoch")
        LRDecay(Exponential(gamma=0.95), interval='epoch')
    """

    def __init__(
        self, schedule: Schedule, interval: Literal["step", "epoch"] = "step", horizon: int | None = None
    ) -> None:
        require_type("schedule", schedule, Schedule)
        require_choice("interval", interval, ("step", "epoch"))
        if horizon is not None:
            require_whole("horizon", horizon, 1)
        self.schedule = schedule
        self.interval = interval
        self.horizon = horizon

        self._length = math.inf  # the horizon in use, unknown until training starts
        self._schedulers: list[LambdaLR] = []
        self._hooks: list[RemovableHandle] = []
        self._steps_taken: list[int] = []
        self._retired = False

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("LRDecay", trainer, pl_module)
        self._retired = False
        if stage == "fit":
            _require_sole_callback(trainer)

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        # A LambdaLR can't load what another scheduler saved, and the trainer's progress tells it enough.
        if any("lr_lambdas" not in state for state in checkpoint.get("lr_schedulers", [])):
            checkpoint["lr_schedulers"] = []
            self._retired = _averages_weights(trainer)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._retired:  # weight averaging owned the rates when the checkpoint was saved, and does so again
            return
        require_free_rates("LRDecay", trainer)
        self._require_countable(trainer)
        self._schedulers = [self._schedule_of(optimizer) for optimizer in trainer.optimizers]
        trainer.strategy.lr_scheduler_configs = [
            LRSchedulerConfig(scheduler, interval=self.interval) for scheduler in self._schedulers
        ]
        if trainer.current_epoch > 0:  # the same trainer goes on, with new optimizers
            for scheduler, steps in zip(self._schedulers, self._steps_taken, strict=False):
                scheduler.last_epoch = steps

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not earlier: asking for the horizon loads the data, after which a stateful loader is not restored.
        self._length = self._horizon_of(trainer)
        for scheduler in self._in_charge(trainer):
            # Saved at the end of an epoch, it may be in the next one already when the trainer is not.
            epochs = max(scheduler.last_epoch + self._behind(trainer).epochs, trainer.current_epoch)
            move(scheduler, self._position(trainer, scheduler, epochs))
            if self.interval == "step" and not pl_module.automatic_optimization:
                self._hooks.append(self._step_after(scheduler.optimizer, scheduler, trainer))

    # Lightning steps the schedulers before each of the next two, which mostly find nothing to do. But it does
    # not under manual optimization, nor after the last batch of a `dataloader_iter` without a length, and it
    # does once too often after a skipped batch, or when it resumes at the end of an epoch under `max_steps`.

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._follow(trainer, epochs=trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer, epochs=trainer.current_epoch + trainer.is_last_batch)

    def on_rewind(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Go back with a callback that prunes and rewinds, which calls this after it did."""
        self._follow(trainer, epochs=trainer.current_epoch)

    @override
    def __reduce__(self) -> tuple[type["LRDecay"], tuple[Schedule, str, int | None]]:
        # The arguments only: hooks and schedulers belong to one process and one fit.
        return type(self), (self.schedule, self.interval, self.horizon)

    @override
    def __repr__(self) -> str:
        horizon = "" if self.horizon is None else f", horizon={self.horizon}"
        return f"LRDecay({self.schedule!r}, interval={self.interval!r}{horizon})"

    def _schedule_of(self, optimizer: Optimizer) -> LambdaLR:
        # A plain function, as a LambdaLR saves the attributes of any other callable into the checkpoint. It
        # reads the horizon late; until training starts only the value at 0, the same for all, is used.
        return OwnGroupsLR(optimizer, lambda t: self.schedule(t, self._length))

    def _in_charge(self, trainer: "pl.Trainer") -> list[LambdaLR]:
        """Return the schedulers that still own their rates: weight averaging replaces them."""
        owners = [config.scheduler for config in trainer.lr_scheduler_configs]
        return [scheduler for scheduler in self._schedulers if scheduler in owners]

    def _position(self, trainer: "pl.Trainer", scheduler: LambdaLR, epochs: float) -> int:
        if self.interval == "epoch":
            return int(epochs - self._behind(trainer).epochs)
        if trainer.lightning_module.automatic_optimization:
            return int(trainer.global_step - self._behind(trainer).steps)
        return scheduler.last_epoch  # moved by its optimizer alone

    def _behind(self, trainer: "pl.Trainer") -> Horizon:
        """Return how far the schedule is behind training because pruning went back in time."""
        rounds = _rounds(trainer)
        return rounds.gone_back if rounds else Horizon(0, 0)

    def _follow(self, trainer: "pl.Trainer", epochs: int) -> None:
        for scheduler in self._in_charge(trainer):
            t = self._position(trainer, scheduler, epochs)
            if t != scheduler.last_epoch:
                move(scheduler, t)

    def _step_after(
        self, optimizer: Optimizer, scheduler: LambdaLR, trainer: "pl.Trainer"
    ) -> RemovableHandle:
        def step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if scheduler in self._in_charge(trainer):
                scheduler.step()

        return optimizer.register_step_post_hook(step)

    def _needs_length(self) -> bool:
        return self.schedule.needs_horizon and self.horizon is None

    def _horizon_of(self, trainer: "pl.Trainer") -> float:
        if self.horizon is not None:
            return self.horizon
        rounds = _rounds(trainer)
        horizon = rounds.round_horizon(trainer) if rounds else training_horizon(trainer)
        length = horizon.epochs if self.interval == "epoch" else horizon.steps
        if self._needs_length() and math.isinf(length):
            other = "step" if self.interval == "epoch" else "epoch"
            raise ValueError(
                f"`{self.schedule!r}` needs to know how many {self.interval}s training takes. Found a loader "
                f'without a length. Give `LRDecay` a `horizon` or `interval="{other}"`, limit the trainer by '
                f"`max_{self.interval}s`, or take a schedule without a horizon, such as `Exponential`."
            )
        return length

    def _require_countable(self, trainer: "pl.Trainer") -> None:
        by_hand = self.interval == "step" and not trainer.lightning_module.automatic_optimization
        if by_hand and _rounds(trainer):
            raise ValueError(
                "Under manual optimization only epochs can be rewound, as each optimizer counts its own steps. Found "
                '`LRDecay` with `interval="step"` and a pruning callback that rewinds. Give `interval="epoch"`.'
            )
        if not self._needs_length():
            return
        if trainer.max_epochs == -1 and trainer.max_steps == -1:
            raise ValueError(
                f"`{self.schedule!r}` needs to know when training ends. Found `max_epochs = -1`. Give the "
                "trainer `max_epochs` or `max_steps`, give `LRDecay` a `horizon`, or take a schedule without "
                "a horizon, such as `Exponential`."
            )
        if self.interval == "step" and not trainer.lightning_module.automatic_optimization:
            raise ValueError(
                f"`{self.schedule!r}` needs to know how many steps each optimizer takes. Found manual "
                "optimization, where only the module knows. Give `LRDecay` that number as `horizon` or "
                '`interval="epoch"`, or take a schedule without a horizon, such as `Exponential`.'
            )

    @override
    def _let_go(self) -> None:
        """Forget the optimizers, but not how many steps they took."""
        for hook in self._hooks:
            hook.remove()
        if self._schedulers:
            self._steps_taken = [scheduler.last_epoch for scheduler in self._schedulers]
        self._hooks, self._schedulers = [], []
        super()._let_go()


def _rounds(trainer: Any) -> TrainsInRounds | None:
    """Return the callback that trains in rounds, each of which restarts the schedule, if there is one."""
    pruning = [c for c in trainer.callbacks if isinstance(c, TrainsInRounds) and c.rewind is not None]
    return pruning[0] if pruning else None


def _averages_weights(trainer: Any) -> bool:
    return any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)


def _require_sole_callback(trainer: Any) -> None:
    found = [callback for callback in trainer.callbacks if isinstance(callback, LRDecay)]
    if len(found) > 1:
        raise ValueError(
            f"A trainer must have one `LRDecay`. Found {found}. Combine them into one schedule, such as "
            "`Warmup(steps, then=...)`."
        )
