"""What pruning needs of the trainer it runs in."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.regrowth import Regrow
from lightning_structopt.pruning.rewinding import Rewind, RewindLR, RewindWeights


def averaged_modules(trainer: Any) -> list[nn.Module]:
    """Return the copies of the module that EMA and SWA callbacks of ``trainer`` keep."""
    # Lightning keeps it under this name in WeightAveraging and StochasticWeightAveraging (a test pins it).
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [
        average.module if isinstance(average, AveragedModel) else average
        for average in averages
        if isinstance(average, nn.Module)
    ]


def restart_rates(trainer: Any, pl_module: Any) -> None:
    """Tell the callbacks that follow a schedule, such as ``LRDecay``, that training has gone back."""
    for callback in trainer.callbacks:
        if hasattr(callback, "on_rewind"):
            callback.on_rewind(trainer, pl_module)


def require_fitting_trainer(trainer: Any, rewind: Rewind | None, regrow: Regrow | None) -> None:
    """Raise if weights can't be pruned as ``trainer`` trains them.

    Raises:
        ValueError: If the strategy, an optimizer, the length of training or another callback does not fit.
    """
    require_strategy_keeps_parameters(trainer)
    require_optimizers_keep_zeros(trainer.optimizers)
    require_end(trainer)
    if rewind is not None:
        require_rewindable(trainer, rewind)
    if regrow is not None:
        require_regrowable(trainer)


def require_strategy_keeps_parameters(trainer: Any, owner: str = "IterativePruning") -> None:
    """Raise if the strategy of ``trainer`` trains something other than the module's own parameters.

    Args:
        trainer: The trainer.
        owner: The callback that asks.

    Raises:
        ValueError: Under DeepSpeed and FSDP1.
    """
    name = type(trainer.strategy).__name__
    if name in {"DeepSpeedStrategy", "FSDPStrategy"}:
        raise ValueError(
            f"`{owner}` masks the module's own parameters. Found "
            f"`{name}`, which trains flattened copies of them. Use `ddp` or `ModelParallelStrategy` (FSDP2)."
        )


def require_optimizers_keep_zeros(optimizers: Sequence[Optimizer]) -> None:
    """Raise if one of ``optimizers`` would revive pruned weights within its step.

    Raises:
        ValueError: For LBFGS.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ValueError(
            "The optimizer must take one step an update. Found `LBFGS`, which moves the weights many times "
            "within a step, pruned ones too. Use SGD, Adam, AdamW or another first-order optimizer."
        )


def require_end(trainer: Any) -> None:
    """Raise if nothing bounds the training of ``trainer``.

    Raises:
        ValueError: If there is neither ``max_epochs`` nor ``max_steps``.
    """
    if trainer.max_epochs in {None, -1} and trainer.max_steps == -1:
        raise ValueError(
            "`begin` and `end` are fractions of the whole training, which must have an end. Found "
            f"`max_epochs = {trainer.max_epochs}` and no `max_steps`. Give one of them to the Trainer."
        )


def require_rewindable(trainer: Any, rewind: Rewind) -> None:
    """Raise if something in ``trainer`` would not go back with the weights or the rate.

    Raises:
        ValueError: If the module has a scheduler of its own, there is no ``LRDecay`` for ``RewindLR``, or an
            averaged model would mix the rounds.
    """
    follows = any(hasattr(callback, "on_rewind") for callback in trainer.callbacks)
    if not follows and (trainer.lr_scheduler_configs or isinstance(rewind, RewindLR)):
        schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        raise ValueError(
            f"With `{rewind!r}` the learning rate restarts in each round, which `LRDecay` does. Found "
            f"{' and '.join(schedulers) or 'no schedule'}. Add an `LRDecay` instead."
        )
    if averaged_modules(trainer) and isinstance(rewind, RewindWeights):
        raise ValueError(
            f"With `{rewind!r}` an average of weights would mix the rounds. Found a callback that averages (EMA or "
            "SWA). Remove it."
        )


def require_regrowable(trainer: Any) -> None:
    """Raise if something in ``trainer`` would hold at zero what is to grow again.

    Raises:
        ValueError: If a ``SparsityPenalty`` hands its zeros over.
    """
    if any(getattr(callback, "freeze_zeros", False) for callback in trainer.callbacks):
        raise ValueError(
            "With `regrow` the sparsity of every layer is constant. Found a `SparsityPenalty` with "
            "`freeze_zeros = True`, which raises it. Remove one of the two."
        )


def require_sole_owner(mine: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Raise if one of ``mine`` is also among the parameters, by name, of another callback.

    Raises:
        ValueError: If it is.
    """
    if shared := [name for name in mine for theirs in others if name in theirs]:
        raise ValueError(
            "A parameter must belong to one `IterativePruning`. Found two that own "
            f"`{shared[0]}`. Divide the parameters between them with `include` and `exclude`."
        )


def require_same_on_all_ranks(trainer: Any, masks: MaskSet) -> None:
    """Raise, on every rank, if ranks decided on different masks.

    Raises:
        RuntimeError: If they did.
    """
    if trainer.world_size == 1:
        return
    digest = torch.tensor([masks.digest()], device=trainer.strategy.root_device)
    digests = torch.as_tensor(trainer.strategy.all_gather(digest)).flatten().tolist()
    if len(set(digests)) > 1:
        raise RuntimeError(
            f"Masks must be the same on every rank. Found {len(set(digests))} different ones on "
            f"{len(digests)} ranks, so the weights differ. Check that the module is built from the same seed and "
            "that nothing changes parameters outside of the optimizer."
        )
