"""Iterative pruning as a Lightning callback."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from rich import print as rich_print
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_lightning, require_type
from lightning_structopt._horizon import Horizon, steps_taken, training_position
from lightning_structopt._release import LetsGo
from lightning_structopt.pruning.clock import Clock
from lightning_structopt.pruning.criteria import Criterion, Magnitude
from lightning_structopt.pruning.host import (
    averaged_modules,
    require_fitting_trainer,
    require_same_on_all_ranks,
    require_sole_owner,
    restart_rates,
)
from lightning_structopt.pruning.masks import MaskSet, unpack_bits
from lightning_structopt.pruning.one_shot import masks_for
from lightning_structopt.pruning.patterns import Pattern, Unstructured
from lightning_structopt.pruning.ramps import CubicRamp, OneShotRamp, Ramp
from lightning_structopt.pruning.regrowth import Regrow, require_constant_sparsity
from lightning_structopt.pruning.report import sparsity_of, sparsity_table, unfinished
from lightning_structopt.pruning.rewinding import Rewind, TrainsInRounds, require_before
from lightning_structopt.pruning.run import PruningRun
from lightning_structopt.pruning.selection import Pick, Spare, as_picks, code_of
from lightning_structopt.pruning.window import Window


class IterativePruning(TrainsInRounds, LetsGo, Callback):
    r"""Zeroes the least important weights, a few at a time, while the model trains.

    Sparsity is absolute: at the end of the window exactly ``round(sparsity * count)`` of the chosen weights
    are zero, and what is zero stays zero, whatever the optimizer, precision, averaging or accumulation. Weights
    are masked in place, so state-dict keys do not change and every checkpoint loads into your own class.

    A step of the ramp is taken at the start of a training batch. Training that stops before the window closes
    ends below the target, with a warning; so does a checkpoint that was the best before it closed: monitor
    ``pruning/sparsity`` beside your metric, or keep the last checkpoint.

    Args:
        sparsity: Fraction of the chosen weights that are zero in the end, in [0, 1).
        criterion: How important a weight is; by default :class:`~lightning_structopt.Magnitude`.
        pattern: Which weights go together and how sparsity is shared among layers; by default
            :class:`~lightning_structopt.Unstructured` over all layers at once.
        ramp: How sparsity grows within the window; by default :class:`~lightning_structopt.CubicRamp`.
        begin: Start of the window as a fraction of the whole training, in [0, 1]; by default 0.1.
        end: End of the window, likewise. Leave some training after it, at a learning rate that can still
            repair: a rate that decays to nothing by then costs more accuracy than the pruning.
        interval: Whether the ramp takes its steps every ``every`` epochs or optimizer steps. Under manual
            optimization a step is a training batch (with ``max_steps``: an optimizer step).
        every: Epochs or optimizer steps between two steps of the ramp, at least 1.
        rewind: What goes back to an early moment after each step of the ramp, so that training between two
            steps is a round of its own: :class:`~lightning_structopt.RewindWeights` (lottery tickets) or
            :class:`~lightning_structopt.RewindLR`.
        regrow: How weights are exchanged while training, at constant sparsity: :class:`~lightning_structopt.RigL`.
            ``criterion`` then draws the first mask, at the start, so leave ``ramp`` and ``begin`` out.
        include: Which parameters to prune: globs on their names or module types. By default all weights of
            two or more dimensions of linear, convolutional, attention and recurrent layers. Globs with
            wildcards narrow that choice; an exact name or a module type (``torch.nn.Embedding``) also adds.
        exclude: Which of them to leave alone: globs or module types.
        spare: ``"first"``, ``"last"`` or ``"both"``: the layer of the first or last chosen weight stays dense.
        verbose: Whether to print a table of all layers in the end.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. At the start of ``fit``, before the first step: if a glob
            matches nothing, the window holds no step, training has no end, an optimizer or strategy can't
            keep zeros, two callbacks own one parameter, or a checkpoint's masks don't fit.

    Example:
        >>> callback = IterativePruning(sparsity=0.9, begin=0.1, end=0.75)
        >>> trainer = pl.Trainer(max_epochs=20, callbacks=[callback])  # doctest: +SKIP

    See Zhu and Gupta, "To prune, or not to prune" (2017), and Han et al., "Learning both Weights and
    Connections for Efficient Neural Networks" (2015).
    """

    def __init__(
        self,
        sparsity: float = 0.9,
        criterion: Criterion | None = None,
        pattern: Pattern | None = None,
        ramp: Ramp | None = None,
        begin: float | None = None,
        end: float = 0.75,
        interval: Literal["epoch", "step"] = "epoch",
        every: int = 1,
        rewind: Rewind | None = None,
        regrow: Regrow | None = None,
        include: Pick | Sequence[Pick] | None = None,
        exclude: Pick | Sequence[Pick] | None = None,
        spare: Spare | None = None,
        verbose: bool = True,
    ) -> None:
        require_in("sparsity", sparsity, 0, 1, closed="left")
        require_choice("interval", interval, ("epoch", "step"))
        begin = (0.1 if regrow is None else 0.0) if begin is None else begin
        self._window = Window(begin, end, every)
        self._target = sparsity
        self.criterion = Magnitude() if criterion is None else criterion
        self.pattern = Unstructured() if pattern is None else pattern
        self.ramp = (CubicRamp() if regrow is None else OneShotRamp()) if ramp is None else ramp
        require_type("criterion", self.criterion, Criterion)
        require_type("pattern", self.pattern, Pattern)
        require_type("ramp", self.ramp, Ramp)
        if regrow is not None:
            require_type("regrow", regrow, Regrow)
            require_constant_sparsity(begin, self.ramp, self.pattern, rewind)
        if rewind is not None:
            require_type("rewind", rewind, Rewind)
            require_before(rewind, begin)
        self.interval = interval
        self.rewind = rewind
        self.regrow = regrow
        self.include = as_picks("include", include)
        self.exclude = as_picks("exclude", exclude)
        if spare is not None:
            require_choice("spare", spare, ("first", "last", "both"))
        self.spare = spare
        require_type("verbose", verbose, bool)
        self.verbose = verbose

        # Between fits everything rests here, as plain data: no reference to a module outlives its training.
        self._state: dict[str, Any] = {"masks": {}, "rewinding": None, "evidence": {}}
        self._from_checkpoint = False
        self._run: PruningRun | None = None
        self._clock = Clock(self._window, interval, None if rewind is None else rewind.to)
        self._moment: int | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by parameter name: bool, of the parameter's shape, True where a weight is kept."""
        if self._run is not None:
            return dict(self._run.masks.whole())
        return {name: unpack_bits(entry) for name, entry in self._state["masks"].items()}

    @property
    def sparsity(self) -> float:
        """The fraction of the chosen weights that are pruned now."""
        if self._run is not None:
            return self._run.masks.sparsity
        return sparsity_of(self.masks)

    @property
    @override
    def gone_back(self) -> Horizon:
        """How far the clock of the learning rate is behind training, by rewinding."""
        if self._run is not None and self._run.rewinder is not None and not self._from_checkpoint:
            return self._run.rewinder.gone_back
        rewinding = self._state["rewinding"]
        return Horizon(*rewinding["gone_back"]) if self._from_checkpoint and rewinding else Horizon(0, 0)

    @property
    @override
    def state_key(self) -> str:
        # Two of these on one trainer own different parameters, so this tells them apart.
        return self._generate_state_key(
            include=code_of(self.include), exclude=code_of(self.exclude), spare=self.spare
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("IterativePruning", trainer, pl_module)
        self._from_checkpoint = False

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        require_fitting_trainer(trainer, self.rewind, self.regrow)
        masks = self._masks_of(pl_module)
        others = [c._masks_of(pl_module).parameters for c in _all(trainer) if c is not self]
        require_sole_owner(masks.parameters, others)
        self._run = PruningRun(masks, pl_module, self.criterion, self.pattern, self.rewind, self.regrow)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not earlier: sharding strategies restore the checkpoint after `on_fit_start`.
        run = self._in_training()
        self._clock.lay(trainer)
        self._moment = None
        if self._from_checkpoint or run.masks.fits(self._state["masks"]):
            run.load_state_dict(self._state)
            run.forget_pruned([], averaged_modules(trainer))
        self._from_checkpoint = False
        if run.regrower is not None:
            run.regrower.lay(trainer)
        run.attach(trainer.optimizers, gradients_are_final=not _touch_gradients(trainer, pl_module))
        if not pl_module.automatic_optimization:
            run.act_before_raw_steps(lambda o: self._before_step(trainer, pl_module, o), trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        rewinder = self._in_training().rewinder
        if rewinder is not None and self._clock.to_be_marked(trainer):
            rewinder.mark(training_position(trainer))
        # A criterion that has seen nothing yet gets to see this batch first.
        if self._is_due(trainer) and not self._in_training().collector.waits:
            self._prune(trainer, pl_module)
        elif batch_idx == 0:
            self._log(trainer, pl_module, on_step=True)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        self._in_training().announce(optimizer)
        self._before_step(trainer, pl_module, optimizer)

    def _before_step(self, trainer: Any, pl_module: "pl.LightningModule", optimizer: Optimizer) -> None:
        # After unscaling and accumulation, before clipping.
        run = self._in_training()
        run.observe(optimizer)
        if self._is_due(trainer) and run.collector.has_all:
            self._prune(trainer, pl_module)
        if run.regrow(steps_taken(trainer), optimizer, trainer.optimizers, averaged_modules(trainer)):
            require_same_on_all_ranks(trainer, run.masks)
        if trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module):
            run.guard.mask_gradients(optimizer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._log(trainer, pl_module, on_step=False)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        masks = self._in_training().masks
        rounding = len(masks.parameters) / masks.total  # scope="layer" rounds in each layer
        if self._moment != self._clock.steps.last and self._target - masks.sparsity > rounding:
            rank_zero_warn(unfinished(masks.sparsity, self._target))
        table = sparsity_table(self.masks)  # on every rank, as each has a part of sharded masks
        if self.verbose:
            rank_zero_only(rich_print)(table)

    @override
    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        if self._run is not None and self._run.shares_state:
            self._run.detach()
            self._run = None  # putting its parts together would wait for ranks that may be gone
        super().on_exception(trainer, pl_module, exception)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._state if self._run is None or self._from_checkpoint else self._run.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        self._from_checkpoint = True

    @override
    def __repr__(self) -> str:
        return (
            f"IterativePruning(sparsity={self._target!r}, criterion={self.criterion!r}, pattern={self.pattern!r}, "
            f"ramp={self.ramp!r}, begin={self._window.begin!r}, end={self._window.end!r}, "
            f"interval={self.interval!r}, every={self._window.every!r}, rewind={self.rewind!r}, "
            f"regrow={self.regrow!r}, "
            f"include={code_of(self.include)}, exclude={code_of(self.exclude)}, spare={self.spare!r}, "
            f"verbose={self.verbose!r})"
        )

    def prune_zeros(self, trainer: "pl.Trainer", names: Iterable[str]) -> None:
        """Hold at zero from now on, whatever the ramp says, what is zero in parameters of these ``names``.

        Args:
            trainer: The trainer whose ``fit`` is under way.
            names: Of parameters; those that another callback owns are left to it.
        """
        run = self._in_training()
        if run.masks.prune_zeros(names):
            require_same_on_all_ranks(trainer, run.masks)
            run.forget_pruned(trainer.optimizers, averaged_modules(trainer))

    def _masks_of(self, pl_module: "pl.LightningModule") -> MaskSet:
        return masks_for(
            pl_module, self._target, self.pattern, self.include or None, self.exclude or None, self.spare
        )

    def _in_training(self) -> PruningRun:
        assert self._run is not None, "called outside of fit"
        return self._run

    def _is_due(self, trainer: Any) -> bool:
        """Whether the ramp has a step to take."""
        return self._clock.reached(trainer) not in {None, self._moment}

    def _prune(self, trainer: Any, pl_module: "pl.LightningModule") -> None:
        run = self._in_training()
        self._moment = self._clock.reached(trainer) or 0
        if run.prune(self.ramp(self._clock.steps.progress(self._moment), self._target)):
            require_same_on_all_ranks(trainer, run.masks)
            if run.rewinder is not None:
                run.go_back(trainer.optimizers, training_position(trainer))
                restart_rates(trainer, pl_module)
            run.forget_pruned(trainer.optimizers, averaged_modules(trainer))
        self._log(trainer, pl_module, on_step=True)

    def _log(self, trainer: Any, pl_module: "pl.LightningModule", *, on_step: bool) -> None:
        if trainer.barebones:
            return
        active = [callback._in_training().masks for callback in _all(trainer)]
        sparsity = sum(masks.pruned for masks in active) / sum(masks.total for masks in active)
        pl_module.log(
            "pruning/sparsity",
            sparsity,
            on_step=on_step,
            on_epoch=not on_step,
            prog_bar=on_step,
            sync_dist=not on_step,  # the same on all ranks, but Lightning warns of epoch values without
        )

    @override
    def _let_go(self) -> None:
        """Keep what there is as plain data, and forget the module and its optimizers."""
        if self._run is not None:
            self._state = self.state_dict()
            self._run.detach()
            self._run = None
        super()._let_go()


def _all(trainer: Any) -> list[IterativePruning]:
    return [callback for callback in trainer.callbacks if isinstance(callback, IterativePruning)]


def _touch_gradients(trainer: Any, pl_module: "pl.LightningModule") -> bool:
    """Tell whether someone's hook may change gradients after this callback masked them."""
    others = [c for c in trainer.callbacks if not isinstance(c, IterativePruning)]
    return is_overridden("configure_gradient_clipping", pl_module) or any(
        is_overridden("on_before_optimizer_step", hooks) for hooks in (pl_module, *others)
    )
