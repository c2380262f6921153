"""Channel pruning as a Lightning callback."""

import math
from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._checks import (
    as_names,
    require_choice,
    require_in,
    require_lightning,
    require_type,
)
from lightning_structopt._horizon import Horizon, training_position
from lightning_structopt._release import HearsLoading
from lightning_structopt._stand_ins import original_of
from lightning_structopt.pruning import CubicRamp, IterativePruning, Magnitude
from lightning_structopt.pruning.clock import Clock
from lightning_structopt.pruning.criteria import Criterion
from lightning_structopt.pruning.host import averaged_modules, require_same_on_all_ranks, restart_rates
from lightning_structopt.pruning.ramps import Ramp
from lightning_structopt.pruning.rewinding import Rewind, TrainsInRounds, require_before
from lightning_structopt.pruning.window import Window
from lightning_structopt.shrinking.choice import Scope
from lightning_structopt.shrinking.examples import example_for
from lightning_structopt.shrinking.host import (
    Removal,
    require_fitting_trainer,
    require_no_other_owner,
    shrink_during_fit,
    shrink_on_load,
    unfinished,
)
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.run import ChannelRun, Limits
from lightning_structopt.shrinking.savings import Savings, costs_of, savings, tell
from lightning_structopt.shrinking.start import prepared
from lightning_structopt.shrinking.targets import Latency, Target


class ChannelPruning(HearsLoading, TrainsInRounds, Callback):
    r"""Takes whole channels, heads and neurons away while the model trains, so that it becomes smaller and faster.

    Channels are chosen as groups: what depends on each other (the rows that make a channel, its norm, the columns
    that read it) goes together. While the window is open they are set to zero, a few at a time, and stay zero
    whatever the optimizer, precision, averaging or accumulation. So removing them changes no output.

    With ``remove="end"`` the module that trains keeps its shapes, and every checkpoint loads into your own class.
    The smaller module is :attr:`shrunk` after ``fit``; :func:`~lightning_structopt.load_shrunk` makes it of any
    checkpoint that was saved after the window closed. With ``remove="now"`` channels are removed from the module
    itself when the window closes, and training goes on faster: parameters are replaced, optimizers keep what they
    know of the rest, averaged models (EMA, SWA) get smaller too. Checkpoints from then on hold the smaller module;
    resume with this callback, load with ``load_shrunk``. With ``remove="never"`` channels are zero, and that is all.

    Args:
        target: How much to keep: ``FLOPs(0.5)``, ``Parameters(0.3)``, ``ChannelRatio(0.5)``, ``Latency(0.6)`` or
            ``MaxBytes(1_000_000)``. Latency is timed once, before the first step.
        criterion: How important a weight is; by default :class:`~lightning_structopt.Magnitude`. The scores of all
            weights of a channel add up.
        ramp: How what is gone grows within the window; by default :class:`~lightning_structopt.CubicRamp`.
        begin: Start of the window as a fraction of the whole training, in [0, 1].
        end: End of the window, likewise. Leave some training after it.
        interval: Whether the ramp takes its steps every ``every`` epochs or optimizer steps. Under manual
            optimization a step is a training batch (with ``max_steps``: an optimizer step).
        every: Epochs or optimizer steps between two steps of the ramp, at least 1.
        remove: When channels are removed for real: ``"end"``, ``"now"`` or ``"never"``.
        example_input: What the module's ``forward`` takes, a tuple for several; by default the module's
            ``example_input_array``, or else the inputs of the first training batch.
        exclude: Globs on names of parameters that keep their shapes.
        scope: ``"layer"`` takes the same fraction everywhere; ``"global"`` compares members of all groups, each
            relative to the mean of its group.
        round_to: Keep a multiple of this many of a group, or all, as some hardware likes it.
        minimum: Keep at least this many of each group.
        include_normalized: Take also from what a layer, group or RMS norm reduces over, so that removal changes
            outputs.
        lasso: Strength of a group lasso over channels, from the first step until the window closes: it brings
            whole channels near zero before they go. 0 for none; try 1e-4 to 1e-2, the more the shorter training is.
        rewind: What goes back to an early moment after each step of the ramp, as in
            :class:`~lightning_structopt.IterativePruning`: ``RewindWeights(to=0.05)`` or ``RewindLR(to=0.05)``.
        verbose: Whether to print a table of costs before and after removal.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. Before the first training step: if the module can't be traced,
            the target is out of reach, the window holds no step, or a strategy, optimizer or other callback does
            not fit.

    Example:
        >>> from lightning_structopt.shrinking.targets import FLOPs
        >>> callback = ChannelPruning(FLOPs(0.5))
        >>> pl.Trainer(max_epochs=20, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
        >>> small = callback.shrunk

    See Fang et al., "DepGraph: Towards Any Structural Pruning" (2023).
    """

    def __init__(
        self,
        target: Target,
        criterion: Criterion | None = None,
        ramp: Ramp | None = None,
        begin: float = 0.1,
        end: float = 0.75,
        interval: Literal["epoch", "step"] = "epoch",
        every: int = 1,
        remove: Removal = "end",
        example_input: Any = None,
        exclude: Sequence[str] | None = None,
        scope: Scope = "layer",
        round_to: int = 1,
        minimum: int = 1,
        include_normalized: bool = False,
        lasso: float = 0.0,
        rewind: Rewind | None = None,
        verbose: bool = True,
    ) -> None:
        self.criterion = Magnitude() if criterion is None else criterion
        self.ramp = CubicRamp() if ramp is None else ramp
        require_type("target", target, Target)
        require_type("criterion", self.criterion, Criterion)
        require_type("ramp", self.ramp, Ramp)
        require_choice("interval", interval, ("epoch", "step"))
        require_choice("remove", remove, ("end", "now", "never"))
        require_in("lasso", lasso, 0, math.inf, closed="left")
        if rewind is not None:
            require_type("rewind", rewind, Rewind)
            require_before(rewind, begin)
        for name, flag in (("include_normalized", include_normalized), ("verbose", verbose)):
            require_type(name, flag, bool)
        self.target = target
        self.interval = interval
        self.remove = remove
        self.changes_shapes = remove == "now"  # while it trains; other callbacks may ask
        self.example_input = example_input
        self.exclude = as_names("exclude", exclude)
        self.lasso = lasso
        self.rewind = rewind
        self.verbose = verbose
        self.shrunk: nn.Module | None = None
        """The smaller module, after a ``fit`` with ``remove="end"``."""

        self._window = Window(begin, end, every)
        self._clock = Clock(self._window, interval, None if rewind is None else rewind.to)
        self._limits = Limits(scope, round_to, minimum, include_normalized)
        # Between fits everything rests here, as plain data: no reference to a module outlives its training.
        self._state: dict[str, Any] = {}
        self._outcome: dict[str, Any] = {}
        self._from_checkpoint = self._started = False
        self._run: ChannelRun | None = None
        self._moment: int | None = None
        self._gone_back = Horizon(0, 0)

    @property
    @override
    def gone_back(self) -> Horizon:
        return self._gone_back

    @property
    def plan(self) -> ShrinkPlan | None:
        """What is removed, and how; None before the window closed."""
        data = (self._state if self._run is None else self._outcome).get("plan")
        return None if data is None else ShrinkPlan.from_data(data)

    @property
    def left(self) -> float:
        """The fraction of the target's cost (FLOPs, parameters, ...) that is left now."""
        return self._run.left if self._run is not None else float(self._state.get("left", 1.0))

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("ChannelPruning", trainer, pl_module)
        self._from_checkpoint, self._gone_back = False, Horizon(0, 0)
        self._listen(shrink_on_load(trainer, pl_module))

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._stop_listening()
        require_fitting_trainer(trainer, self.remove, self.rewind)
        self._started, self._run, self.shrunk = False, None, None

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if not self._started:  # not earlier: the module is traced with the inputs of a batch
            self._start(trainer, pl_module, batch)
        if self._run is not None and self._run.rewinder is not None and self._clock.to_be_marked(trainer):
            self._run.rewinder.mark(training_position(trainer))
        # A criterion that has seen nothing yet gets to see this batch first.
        if self._is_due(trainer) and self._run is not None and not self._run.collector.waits:
            self._prune(trainer, pl_module)
        elif batch_idx == 0:
            self._log(trainer, pl_module, on_step=True)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if self._run is not None:
            self._run.announce(optimizer)
        self._before_step(trainer, pl_module, optimizer)

    def _before_step(self, trainer: Any, pl_module: "pl.LightningModule", optimizer: Optimizer) -> None:
        # After unscaling and accumulation, before clipping.
        run = self._run
        if run is None:
            return
        run.observe(optimizer)
        if self._is_due(trainer) and run.collector.has_all:
            self._prune(trainer, pl_module)
        clips = trainer.gradient_clip_val or is_overridden("configure_gradient_clipping", pl_module)
        if clips and self._run is not None:  # which may have been the last step of the ramp
            run.guard.mask_gradients(optimizer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._log(trainer, pl_module, on_step=False)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if self._run is not None and not self._outcome["closed"]:
            rank_zero_warn(unfinished(self.left))

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not at the end of training: averages become the weights there.
        run, plan = self._run, self.plan
        if self.remove != "end" or run is None or plan is None:
            return
        self.shrunk = plan.apply(original_of(pl_module))
        if self._tells(trainer):
            inputs, device = run.structure.inputs, trainer.strategy.root_device
            tell(savings((pl_module, self.shrunk), run.flops, inputs, device), self.target, self.verbose)

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
        if self._run is None or self._from_checkpoint:
            return self._state
        return {**self._run.state_dict(), **self._outcome}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
        self._from_checkpoint = True
        if rewinding := state_dict.get("rewinding"):
            self._gone_back = Horizon(*rewinding["gone_back"])

    @override
    def __repr__(self) -> str:
        given = {**vars(self._window), **vars(self._limits), **vars(self)}
        return f"ChannelPruning({', '.join(f'{name}={given[name]!r}' for name in signature(type(self)).parameters)})"

    def _start(self, trainer: Any, pl_module: "pl.LightningModule", batch: Any) -> None:
        self._started, self._moment = True, None
        self._clock.lay(trainer)
        resumes, self._from_checkpoint = self._from_checkpoint, False
        plan = self.plan
        if self._state.get("removed") and plan is not None and plan.is_done(pl_module):
            return  # nothing is left to do
        inputs = trainer.precision_plugin.convert_input(example_for(pl_module, self.example_input, batch))
        known = self._state.get("target_flops") if resumes else None
        wanted = (self.exclude, self.target, self.criterion, self._limits, self.lasso, self.rewind)
        run, flops = prepared(pl_module, inputs, *wanted, known, trainer.strategy)
        for other in trainer.callbacks:
            if isinstance(other, IterativePruning):
                require_no_other_owner(run.masks.parameters, other.masks)
        self._outcome = {"plan": None, "removed": False, "closed": False, "target_flops": flops}
        if (resumes and "kept" in self._state) or run.fits(self._state):
            run.load_state_dict(self._state)
            run.forget_pruned([], averaged_modules(trainer))
            self._outcome = {name: self._state[name] for name in self._outcome}
        run.start(trainer.optimizers, penalize=not self._outcome["closed"])
        self._run = run
        if not pl_module.automatic_optimization:
            run.act_before_raw_steps(lambda o: self._before_step(trainer, pl_module, o), trainer.optimizers)

    def _is_due(self, trainer: Any) -> bool:
        """Whether the ramp has a step to take."""
        return self._clock.reached(trainer) not in {None, self._moment}

    def _prune(self, trainer: Any, pl_module: "pl.LightningModule") -> None:
        run = self._run
        assert run is not None
        self._moment = self._clock.reached(trainer) or 0
        progress = self._clock.steps.progress(self._moment)
        if run.prune(1 - self.ramp(progress, 1 - run.budget.keep)):
            require_same_on_all_ranks(trainer, run.masks)
            if run.rewinder is not None:
                run.go_back(trainer.optimizers, training_position(trainer))
                self._gone_back = run.rewinder.gone_back
                restart_rates(trainer, pl_module)
            run.forget_pruned(trainer.optimizers, averaged_modules(trainer))
        if progress == 1:
            self._close(trainer, pl_module, run)
        self._log(trainer, pl_module, on_step=True)

    def _close(self, trainer: Any, pl_module: "pl.LightningModule", run: ChannelRun) -> None:
        """Lay down what is removed, now that the window has closed, and remove it if that is to be now."""
        self._outcome["closed"] = True
        run.close()
        if self._outcome["plan"] is None and self.remove != "never":
            self._outcome["plan"] = run.removed().plan.as_data()
        if self.remove == "now":
            inputs, flops = run.structure.inputs, run.flops
            before = costs_of(pl_module, flops[0], inputs) if self._tells(trainer) else None
            run.detach()
            gone_back = {"gone_back": [self._gone_back.epochs, self._gone_back.steps]}
            self._state = {**self._outcome, "left": run.left, "removed": True, "rewinding": gone_back}
            self._run = None
            shrink_during_fit(trainer, pl_module, ShrinkPlan.from_data(self._state["plan"]))
            if before is not None:
                tell(Savings(before, costs_of(pl_module, flops[1], inputs)), self.target, self.verbose)

    def _tells(self, trainer: Any) -> bool:
        """Whether what was saved is worth timing."""
        return bool(trainer.is_global_zero) and (self.verbose or isinstance(self.target, Latency))

    def _log(self, trainer: Any, pl_module: "pl.LightningModule", *, on_step: bool) -> None:
        if not trainer.barebones:  # `sync_dist`, as Lightning warns of epoch values without
            when: dict[str, Any] = {"on_step": on_step, "on_epoch": not on_step, "sync_dist": not on_step}
            pl_module.log("pruning/left", self.left, prog_bar=on_step, **when)

    @override
    def _let_go(self) -> None:
        """Keep what there is as plain data, and forget the module and its optimizers."""
        self._state = self.state_dict()
        if self._run is not None:
            self._run.detach()
            self._run = None
        super()._let_go()
