"""Sparsity penalties as a Lightning callback."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_lightning, require_type
from lightning_structopt._horizon import steps_taken, training_horizon
from lightning_structopt._precision import widened
from lightning_structopt._rates import require_rates
from lightning_structopt._release import LetsGo
from lightning_structopt.pruning import IterativePruning
from lightning_structopt.pruning.raw_steps import RawSteps
from lightning_structopt.pruning.selection import Pick, as_picks, code_of, select_parameters
from lightning_structopt.regularization.penalties import L2, Penalty, knows_steps_of, step_sizes
from lightning_structopt.schedules import Schedule

_Kind = TypeVar("_Kind")


class SparsityPenalty(LetsGo, Callback):
    r"""Trains on loss plus penalty, with weights that become exactly zero.

    ``mode="proximal"``: the module's own optimizer steps on the loss alone, and after each of its steps the
    penalty's proximal map moves the weights, :math:`w \leftarrow \text{prox}(w, s)`. Its step size :math:`s` is
    the optimizer's own: the rate times the reach of momentum, and for Adam, AdamW, NAdam, RMSprop, Adagrad and
    Adamax one for each weight, :math:`a / (\sqrt{\hat v} + \epsilon)`. So training comes to rest at the minimum
    of loss plus penalty, whatever the optimizer: at the lasso, for a linear model. Of other optimizers only the
    rate is known: their penalty is decoupled from the loss, as weight decay is in AdamW, with a warning. Steps
    that a gradient scaler skips have no map. Clipping shortens the gradients of the loss, not the penalty.

    ``mode="gradient"``: the subgradient is added before each step, before clipping. Weights come near zero.

    Weights that got no gradient are left alone, as optimizers do. ``penalty/value`` and ``penalty/zeros``, the
    fraction of the chosen weights that are zero, are logged at the end of each epoch. The optimizer's own
    ``weight_decay`` goes with this: under SGD, ``L1`` and weight decay make the elastic net.

    Args:
        penalty: ``L1``, ``L2``, ``GroupLasso`` or a :class:`~lightning_structopt.Penalty` of your own.
        mode: ``"proximal"`` or ``"gradient"``.
        schedule: What the strength is multiplied by, over optimizer steps (over batches under manual optimization
            without ``max_steps``).
        include: Which parameters to penalize: globs or module types, with the meaning and the default that they
            have in :class:`~lightning_structopt.IterativePruning`.
        exclude: Which of them to leave alone, likewise.
        freeze_zeros: Whether ``IterativePruning`` of the same trainer takes over what is zero at the end of each
            epoch, so that it stays zero. It counts in that callback's sparsity, even above its target.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. At the start of ``fit``, before the first step: if a glob
            matches nothing, two of these own one parameter, an optimizer or strategy does not fit, the schedule
            needs an end of training and there is none, or nobody takes over the zeros.

    Example:
        >>> from lightning_structopt.regularization.penalties import L1
        >>> SparsityPenalty(L1(1e-4), exclude="head.*").penalty
        L1(strength=0.0001)

    See Parikh and Boyd, "Proximal Algorithms" (2014), and Yun, Lozano and Yang, "Adaptive Proximal Gradient
    Methods for Structured Neural Networks" (2021).
    """

    def __init__(
        self,
        penalty: Penalty,
        mode: Literal["proximal", "gradient"] = "proximal",
        schedule: Schedule | None = None,
        include: Pick | Sequence[Pick] | None = None,
        exclude: Pick | Sequence[Pick] | None = None,
        freeze_zeros: bool = False,
    ) -> None:
        require_type("penalty", penalty, Penalty)
        require_choice("mode", mode, ("proximal", "gradient"))
        if schedule is not None:
            require_type("schedule", schedule, Schedule)
        require_type("freeze_zeros", freeze_zeros, bool)
        if freeze_zeros and (mode == "gradient" or isinstance(penalty, L2)):
            raise ValueError(
                "`freeze_zeros` needs a penalty that brings weights to zero. Found "
                f'`{penalty!r}` with `mode = {mode!r}`. Use `L1` or `GroupLasso` with `mode="proximal"`.'
            )
        self.penalty = penalty
        self.mode = mode
        self.schedule = schedule
        self.include = as_picks("include", include)
        self.exclude = as_picks("exclude", exclude)
        self.freeze_zeros = freeze_zeros

        self._parameters: dict[str, nn.Parameter] = {}
        self._chosen: set[int] = set()
        self._attached = False
        self._hooks: list[RemovableHandle] = []
        self._raw_steps = RawSteps(self._add_subgradients)
        self._length = math.inf
        self._factor = 1.0

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("SparsityPenalty", trainer, pl_module)

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        _require_own_parameters(trainer)
        _require_optimizers_fit(trainer, self.mode)
        self._parameters = self._select(pl_module)
        self._chosen = {id(parameter) for parameter in self._parameters.values()}
        self._require_sole_owner(trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        # Not earlier: asking for the horizon loads the data, after which a stateful loader is not restored.
        self._length = self._horizon_of(trainer)
        if self.freeze_zeros:
            _require_pruned(trainer, self._parameters)

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if not self._attached:  # not earlier: the map is to find weights that `IterativePruning` has masked
            self._attach(trainer.optimizers)
        if self.schedule is not None:
            self._factor = self.schedule(steps_taken(trainer), self._length)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        # After unscaling and accumulation, before clipping.
        if self.mode == "gradient":
            self._raw_steps.announce(optimizer)
            self._add_subgradients(optimizer)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of the epoch: a checkpoint after validation would come before that.
        if self.freeze_zeros and trainer.is_last_batch:
            for pruning in _all(IterativePruning, trainer):
                pruning.prune_zeros(trainer, self._parameters)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        penalties = _all(SparsityPenalty, trainer)
        if penalties[0] is not self or trainer.barebones:
            return  # the first one logs for all of them
        weights = [weight for callback in penalties for weight in callback._parameters.values()]
        zeros = sum(_number((weight.detach() == 0).sum()) for weight in weights)
        values = {
            "penalty/value": sum(callback._value() for callback in penalties),
            "penalty/zeros": zeros / sum(weight.numel() for weight in weights),
        }
        # The same on all ranks, but Lightning warns of epoch values without `sync_dist`.
        pl_module.log_dict(values, on_step=False, on_epoch=True, sync_dist=True)

    @override
    def __reduce__(self) -> tuple[type["SparsityPenalty"], tuple[Any, ...]]:
        # The arguments only: hooks and parameters belong to one process and one fit.
        arguments = (self.penalty, self.mode, self.schedule, self.include, self.exclude, self.freeze_zeros)
        return type(self), arguments

    @override
    def __repr__(self) -> str:
        return (
            f"SparsityPenalty({self.penalty!r}, mode={self.mode!r}, schedule={self.schedule!r}, "
            f"include={code_of(self.include)}, exclude={code_of(self.exclude)}, freeze_zeros={self.freeze_zeros!r})"
        )

    def _select(self, pl_module: nn.Module) -> dict[str, nn.Parameter]:
        return select_parameters(pl_module, self.include or None, self.exclude or None)

    def _attach(self, optimizers: Sequence[Optimizer]) -> None:
        self._attached = True
        if self.mode == "proximal":
            self._hooks = [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        else:
            self._raw_steps.attach(optimizers)

    def _stepped(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        """Yield the chosen weights that ``optimizer`` moves in this step, with their parameter groups."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self._chosen and parameter.grad is not None:
                    yield group, parameter

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._factor == 0 or _skipped(optimizer):
            return
        for group, parameter in self._stepped(optimizer):
            step = self._factor * step_sizes(optimizer, group, parameter)
            parameter.copy_(self.penalty.proximal(widened(parameter), step))

    @torch.no_grad()
    def _add_subgradients(self, optimizer: Optimizer) -> None:
        for group, parameter in self._stepped(optimizer):
            subgradient = self.penalty.gradient(widened(parameter))
            sign = -1 if group.get("maximize") else 1
            assert parameter.grad is not None
            parameter.grad.add_(subgradient, alpha=sign * self._factor)

    @torch.no_grad()
    def _value(self) -> float:
        weights = self._parameters.values()
        return self._factor * sum(_number(self.penalty.value(widened(weight))) for weight in weights)

    def _horizon_of(self, trainer: Any) -> float:
        if self.schedule is None:
            return math.inf
        length = training_horizon(trainer).steps
        if self.schedule.needs_horizon and math.isinf(length):
            raise ValueError(
                f"`{self.schedule!r}` needs to know how many steps training takes. Found neither `max_steps` nor "
                "`max_epochs` with a loader that has a length. Give the trainer `max_steps`, or take a schedule "
                "without a horizon, such as `Warmup(steps, then=Constant())`."
            )
        return length

    def _require_sole_owner(self, trainer: Any, pl_module: "pl.LightningModule") -> None:
        for other in _all(SparsityPenalty, trainer):
            theirs = {} if other is self else other._select(pl_module)
            if shared := [name for name in self._parameters if name in theirs]:
                raise ValueError(
                    "A parameter must belong to one `SparsityPenalty`. Found two that own "
                    f"`{shared[0]}`. Divide the parameters between them with `include` and `exclude`; for the "
                    "elastic net, give `weight_decay` to the optimizer."
                )

    @override
    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._raw_steps.detach()
        self._parameters, self._chosen, self._hooks, self._attached = {}, set(), [], False
        self._length, self._factor = math.inf, 1.0
        super()._let_go()


def _all(kind: type[_Kind], trainer: Any) -> list[_Kind]:
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]


def _skipped(optimizer: Optimizer) -> bool:
    """Tell whether a gradient scaler made a fused ``optimizer`` leave all weights as they were."""
    found_inf = getattr(optimizer, "found_inf", None)  # there during such a step only
    return found_inf is not None and bool(found_inf)


def _number(scalar: Tensor) -> float:
    return float(scalar.full_tensor() if isinstance(scalar, DTensor) else scalar)


def _require_own_parameters(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if name in {"DeepSpeedStrategy", "FSDPStrategy"}:
        raise ValueError(
            "`SparsityPenalty` acts on the module's own parameters. Found "
            f"`{name}`, which trains flattened copies of them. Use `ddp` or `ModelParallelStrategy` (FSDP2)."
        )


def _require_optimizers_fit(trainer: Any, mode: str) -> None:
    require_rates("SparsityPenalty", trainer)
    for optimizer in trainer.optimizers:
        if mode == "proximal":
            _require_proximal_step(optimizer)
        else:
            _require_plain_gradients(trainer, optimizer)


def _require_proximal_step(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            '`mode="proximal"` needs an optimizer that takes one step an update. Found `LBFGS`, which searches along '
            "a line for the minimum of the loss alone. Use SGD, Adam or another first-order method."
        )
    if not knows_steps_of(optimizer):
        rank_zero_warn(
            f"How `{name}` scales gradients is not known to `SparsityPenalty`, so the proximal map goes with its "
            "learning rate, as a decoupled penalty, and `strength` has a scale of its own. For the penalty of the "
            'loss, use SGD, Adam, AdamW, NAdam, RMSprop, Adagrad or Adamax, or `mode="gradient"`.'
        )


def _require_plain_gradients(trainer: Any, optimizer: Optimizer) -> None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            '`mode="gradient"` needs unscaled gradients before the step. Found a fused '
            f"`{type(optimizer).__name__}` with a gradient scaler, which unscales within its step. Give the "
            'optimizer `fused=False`, or use `mode="proximal"`.'
        )
    if any(group.get("line_search_fn") for group in optimizer.param_groups):
        raise ValueError(
            '`mode="gradient"` adds to gradients, not to the loss. Found `LBFGS` with a line search, which compares '
            "losses. Leave out `line_search_fn`, or use a first-order method."
        )


def _require_pruned(trainer: Any, names: Mapping[str, object]) -> None:
    pruned = {name for callback in _all(IterativePruning, trainer) for name in callback.masks}
    if missing := [name for name in names if name not in pruned]:
        raise ValueError(
            "With `freeze_zeros=True` an `IterativePruning` on the same trainer must own the penalized parameters. "
            f"Found none that owns `{missing[0]}`. Add one, or give both the same `include` and `exclude`."
        )
