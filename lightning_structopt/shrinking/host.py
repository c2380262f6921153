"""What channel pruning needs of the trainer it runs in."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_structopt.pruning.host import (
    averaged_modules,
    require_end,
    require_optimizers_keep_zeros,
    require_rewindable,
    require_strategy_keeps_parameters,
)
from lightning_structopt.pruning.rewinding import Rewind
from lightning_structopt.shrinking.loading import plan_in
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.replacement import shrink_in_place

Removal: TypeAlias = Literal["end", "now", "never"]


def require_fitting_trainer(trainer: Any, remove: Removal, rewind: Rewind | None) -> None:
    """Raise if channels can't be pruned as ``trainer`` trains the module.

    Raises:
        ValueError: If the strategy, an optimizer, the length of training or another callback does not fit.
    """
    require_strategy_keeps_parameters(trainer, "ChannelPruning")
    _require_whole_parameters(trainer)
    if remove == "now":
        require_replaceable(trainer, '`remove="now"`', 'Give `remove="end"`.')
    require_optimizers_keep_zeros(trainer.optimizers)
    require_end(trainer)
    if rewind is not None:
        require_rewindable(trainer, rewind)


def _require_whole_parameters(trainer: Any) -> None:
    name = type(trainer.strategy).__name__
    if name == "ModelParallelStrategy":
        raise ValueError(
            f"`ChannelPruning` traces the module, which must be whole on every rank. Found `{name}` (FSDP2). Use "
            "`ddp`; or zero neurons by `IterativePruning(pattern=Neurons())` and call `so.shrink` after training."
        )


def require_replaceable(trainer: Any, what: str, remedy: str) -> None:
    """Raise if parameters can't be replaced as ``trainer`` trains them.

    Args:
        trainer: The trainer.
        what: What replaces them.
        remedy: What to do about it.

    Raises:
        ValueError: Unless it trains on one device or under ``ddp``.
    """
    name = type(trainer.strategy).__name__
    if name not in {"SingleDeviceStrategy", "DDPStrategy"}:
        raise ValueError(
            f"{what} replaces parameters while they train, which works on one device and under `ddp`. Found "
            f"`{name}`. {remedy}"
        )


def require_no_other_owner(mine: Iterable[str], theirs: Mapping[str, Tensor]) -> None:
    """Raise if an ``IterativePruning`` owns one of ``mine``.

    Raises:
        ValueError: If it does.
    """
    if shared := [name for name in mine if name in theirs]:
        raise ValueError(
            "A parameter must belong to one callback that prunes. Found that `ChannelPruning` and "
            f"`IterativePruning` both own `{shared[0]}`. Divide the parameters between them with `exclude`, or remove "
            "one of the two."
        )


def unfinished(left: float) -> str:
    """Return the warning for a training that stopped early, when a fraction ``left`` of the cost was left."""
    return (
        f"Training ended before the pruning window closed: {left:.4f} of the cost is left. Train to the end of the "
        "window, or give a smaller `end`."
    )


def shrink_during_fit(trainer: Any, module: nn.Module, plan: ShrinkPlan) -> None:
    """Make the module that ``trainer`` trains smaller, with all that belongs to it.

    Args:
        trainer: The trainer, between two optimizer steps, or between a backward pass and its step.
        module: The module.
        plan: What to keep.
    """
    change_during_fit(trainer, module, lambda each, optimizers: shrink_in_place(each, plan, optimizers))


def change_during_fit(
    trainer: Any, module: nn.Module, change: Callable[[nn.Module, Sequence[Optimizer]], None]
) -> None:
    """Change the shapes of the module that ``trainer`` trains, and of the averages that callbacks keep of it.

    Args:
        trainer: The trainer, between two optimizer steps, or between a backward pass and its step.
        module: The module.
        change: Changes a module where it is, and what optimizers remember of it.
    """
    strategy = trainer.strategy
    wrapped = hasattr(strategy, "configure_ddp")
    if wrapped:
        strategy.model = module  # the old wrapper knows the old shapes
    change(module, trainer.optimizers)
    for average in averaged_modules(trainer):
        change(average, ())
    if wrapped:
        strategy.configure_ddp()


def shrink_on_load(trainer: Any, module: nn.Module) -> RemovableHandle:
    """Make ``module`` as small as the checkpoint that it is about to load, where that holds a smaller one.

    Lightning loads weights before it gives callbacks their state, so that the plan is looked up in the checkpoint.

    Args:
        trainer: The trainer that loads it.
        module: The module that is trained; averages that callbacks keep of it get smaller with it.
    """

    def before_load(part: nn.Module, state: Mapping[str, Tensor], *rest: Any) -> None:
        plan = plan_in(being_loaded(trainer))
        if plan is not None and _is_small(state, plan):
            for each in (module, *averaged_modules(trainer)):
                if not plan.is_done(each):
                    shrink_in_place(each, plan)

    handle: RemovableHandle = module.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call]
    return handle


def being_loaded(trainer: Any) -> Mapping[str, Any]:
    """Return the checkpoint that ``trainer`` is loading; empty if there is none."""
    # Under this name Lightning keeps it (a test pins it).
    return trainer._checkpoint_connector._loaded_checkpoint or {}


def _is_small(state: Mapping[str, Tensor], plan: ShrinkPlan) -> bool:
    small = plan.small_shapes()
    return bool(small) and all(name in state and list(state[name].shape) == small[name] for name in small)
