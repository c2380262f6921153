"""Iterative pruning as a Lightning callback."""

import math
from collections.abc import Mapping, Sequence
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
from lightning_structopt._horizon import steps_taken, training_horizon
from lightning_structopt._release import release
from lightning_structopt.pruning.criteria import Criterion, Magnitude
from lightning_structopt.pruning.guard import ZeroGuard
from lightning_structopt.pruning.host import (
    averaged_modules,
    require_end,
    require_optimizers_keep_zeros,
    require_same_on_all_ranks,
    require_strategy_keeps_parameters,
)
from lightning_structopt.pruning.masks import MaskSet, unpack_bits
from lightning_structopt.pruning.one_shot import advance, masks_for
from lightning_structopt.pruning.patterns import Pattern, Unstructured
from lightning_structopt.pruning.ramps import CubicRamp, Ramp
from lightning_structopt.pruning.report import sparsity_table
from lightning_structopt.pruning.selection import Pick, Spare, as_picks
from lightning_structopt.pruning.window import RampSteps, Window


class IterativePruning(Callback):
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
        begin: Start of the window as a fraction of the whole training, in [0, 1].
        end: End of the window, likewise. Leave some training after it, at a learning rate that can still
            repair: a rate that decays to nothing by then costs more accuracy than the pruning.
        interval: Whether the ramp takes its steps every ``every`` epochs or optimizer steps. Under manual
            optimization a step is a training batch (with ``max_steps``: an optimizer step).
        every: Epochs or optimizer steps between two steps of the ramp, at least 1.
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
        begin: float = 0.1,
        end: float = 0.75,
        interval: Literal["epoch", "step"] = "epoch",
        every: int = 1,
        include: Pick | Sequence[Pick] | None = None,
        exclude: Pick | Sequence[Pick] | None = None,
        spare: Spare | None = None,
        verbose: bool = True,
    ) -> None:
        require_in("sparsity", sparsity, 0, 1, closed="left")
        require_choice("interval", interval, ("epoch", "step"))
        self._window = Window(begin, end, every)
        self._target = sparsity
        self.criterion = Magnitude() if criterion is None else criterion
        self.pattern = Unstructured() if pattern is None else pattern
        self.ramp = CubicRamp() if ramp is None else ramp
        require_type("criterion", self.criterion, Criterion)
        require_type("pattern", self.pattern, Pattern)
        require_type("ramp", self.ramp, Ramp)
        self.interval = interval
        self.include = as_picks("include", include)
        self.exclude = as_picks("exclude", exclude)
        if spare is not None:
            require_choice("spare", spare, ("first", "last", "both"))
        self.spare = spare
        self.verbose = verbose

        # Between fits the masks rest here, as plain data: no reference to a module outlives its training.
        self._packed: dict[str, dict[str, Any]] = {}
        self._from_checkpoint = False
        self._masks: MaskSet | None = None
        self._guard: ZeroGuard | None = None
        self._steps = RampSteps(0, 0, 1, 0)
        self._moment: int | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks by parameter name: bool, of the parameter's shape, True where a weight is kept."""
        if self._masks is not None:
            return dict(self._masks.whole())
        return {name: unpack_bits(entry) for name, entry in self._packed.items()}

    @property
    def sparsity(self) -> float:
        """The fraction of the chosen weights that are pruned now."""
        if self._masks is not None:
            return self._masks.sparsity
        masks = self.masks.values()
        total = sum(mask.numel() for mask in masks)
        return 1 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0

    @property
    @override
    def state_key(self) -> str:
        # Two of these on one trainer own different parameters, so this tells them apart.
        return self._generate_state_key(
            include=_shown(self.include), exclude=_shown(self.exclude), spare=self.spare
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("IterativePruning", trainer, pl_module)
        self._from_checkpoint = False

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        require_strategy_keeps_parameters(trainer)
        require_optimizers_keep_zeros(trainer.optimizers)
        require_end(trainer)
        self._masks = self._masks_of(pl_module)
        self._require_sole_owner(trainer, pl_module, self._masks.parameters)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not earlier: sharding strategies restore the checkpoint after `on_fit_start`.
        masks = self._in_training()
        self._steps = self._lay_window(trainer)
        self._moment = None
        if self._from_checkpoint or masks.fits(self._packed):
            masks.unpack(self._packed)
            self._mask_averages(trainer)
        self._guard = ZeroGuard(masks, gradients_are_final=not _touch_gradients(trainer, pl_module))
        self._guard.attach(trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        moment = self._steps.reached(self._now(trainer))
        if moment is not None and moment != self._moment:
            self._moment = moment
            self._prune(trainer, self.ramp(self._steps.progress(moment), self._target))
            self._log(trainer, pl_module, on_step=True)
        elif batch_idx == 0:
            self._log(trainer, pl_module, on_step=True)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        # After unscaling and accumulation, before clipping.
        if self._guard is not None:
            self._guard.mask_gradients(optimizer)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._log(trainer, pl_module, on_step=False)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        masks = self._in_training()
        rounding = len(masks.parameters) / masks.total  # scope="layer" rounds in each layer
        if self._moment != self._steps.last and self._target - masks.sparsity > rounding:
            rank_zero_warn(
                f"Training ended before the pruning window closed: sparsity is {masks.sparsity:.4f}, the target "
                f"{self._target}. Train to the end of the window, or give a smaller `end`."
            )
        table = sparsity_table(self.masks)  # on every rank, as each has a part of sharded masks
        if self.verbose:
            rank_zero_only(rich_print)(table)

    @override
    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        if self._masks is not None and self._masks.sharding.mesh is not None:
            self._masks = None  # putting sharded masks together would wait for ranks that may be gone
        self._let_go()

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"masks": self._packed if self._masks is None else self._masks.pack()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._packed = state_dict["masks"]
        self._from_checkpoint = True

    @override
    def __repr__(self) -> str:
        return (
            f"IterativePruning(sparsity={self._target!r}, criterion={self.criterion!r}, pattern={self.pattern!r}, "
            f"ramp={self.ramp!r}, begin={self._window.begin!r}, end={self._window.end!r}, "
            f"interval={self.interval!r}, every={self._window.every!r}, include={_shown(self.include)}, "
            f"exclude={_shown(self.exclude)}, spare={self.spare!r}, verbose={self.verbose!r})"
        )

    def _masks_of(self, pl_module: "pl.LightningModule") -> MaskSet:
        return masks_for(
            pl_module, self._target, self.pattern, self.include or None, self.exclude or None, self.spare
        )

    def _in_training(self) -> MaskSet:
        assert self._masks is not None, "called outside of fit"
        return self._masks

    def _prune(self, trainer: "pl.Trainer", sparsity: float) -> None:
        masks = self._in_training()
        if not advance(masks, sparsity, self.criterion, self.pattern):
            return
        require_same_on_all_ranks(trainer, masks)
        for optimizer in trainer.optimizers:
            masks.apply_to_state(optimizer)
        self._mask_averages(trainer)

    def _mask_averages(self, trainer: Any) -> None:
        """Mask the models of EMA and SWA; once zero, an average of zeros stays zero."""
        for average in averaged_modules(trainer):
            self._in_training().apply_to_copy(average)

    def _lay_window(self, trainer: Any) -> RampSteps:
        if trainer.fast_dev_run:
            return RampSteps(0, 0, 1, 0)  # one batch: go through everything in it
        horizon = training_horizon(trainer)
        total = horizon.epochs if self.interval == "epoch" else horizon.steps
        if math.isinf(total):
            other = "step" if self.interval == "epoch" else "epoch"
            raise ValueError(
                f"The window needs the length of training in {self.interval}s. Found a loader without a length. "
                f'Give `interval="{other}"`, `max_steps`, or `limit_train_batches`.'
            )
        return self._window.steps(total, self.interval)

    def _now(self, trainer: "pl.Trainer") -> int:
        return trainer.current_epoch if self.interval == "epoch" else steps_taken(trainer)

    def _log(self, trainer: Any, pl_module: "pl.LightningModule", *, on_step: bool) -> None:
        if trainer.barebones:
            return
        active = [c._in_training() for c in trainer.callbacks if isinstance(c, IterativePruning)]
        sparsity = sum(masks.pruned for masks in active) / sum(masks.total for masks in active)
        pl_module.log(
            "pruning/sparsity",
            sparsity,
            on_step=on_step,
            on_epoch=not on_step,
            prog_bar=on_step,
            sync_dist=not on_step,  # the same on all ranks, but Lightning warns of epoch values without
        )

    def _require_sole_owner(
        self, trainer: Any, pl_module: "pl.LightningModule", mine: Mapping[str, Tensor]
    ) -> None:
        for other in trainer.callbacks:
            if isinstance(other, IterativePruning) and other is not self:
                theirs = other._masks_of(pl_module).parameters
                if shared := [name for name in mine if name in theirs]:
                    raise ValueError(
                        "A parameter must belong to one `IterativePruning`. Found two that own "
                        f"`{shared[0]}`. Divide the parameters between them with `include` and `exclude`."
                    )

    def _let_go(self) -> None:
        """Keep the masks as plain data and forget the module and its optimizers."""
        if self._guard is not None:
            self._guard.detach()
            self._guard = None
        if self._masks is not None:
            self._packed = self._masks.pack()
            self._masks = None
        release(self)


def _shown(picks: Sequence[Pick]) -> str:
    """Return code that evaluates to ``picks``, with module types by their full names."""
    if not picks:
        return "None"
    names = (repr(p) if isinstance(p, str) else f"{p.__module__}.{p.__qualname__}" for p in picks)
    return f"[{', '.join(names)}]"


def _touch_gradients(trainer: Any, pl_module: "pl.LightningModule") -> bool:
    """Tell whether someone's hook may change gradients after this callback masked them."""
    others = [c for c in trainer.callbacks if not isinstance(c, IterativePruning)]
    return is_overridden("configure_gradient_clipping", pl_module) or any(
        is_overridden("on_before_optimizer_step", hooks) for hooks in (pl_module, *others)
    )
