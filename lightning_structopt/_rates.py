"""Learning rates of a trainer's optimizers: that there are some, and schedules put where training is."""

import warnings
from typing import Any

from torch.optim.lr_scheduler import LambdaLR


def require_rates(owner: str, trainer: Any) -> None:
    """Raise unless the trainer has optimizers, and all of them learning rates.

    Args:
        owner: The callback that asks.
        trainer: The trainer that called it.

    Raises:
        ValueError: If it hasn't.
    """
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if not groups or any("lr" not in group for group in groups):
        raise ValueError(
            f"`{owner}` needs optimizers with learning rates. Found {trainer.optimizers}. Return one from "
            "`configure_optimizers`, or remove the callback."
        )


def move(scheduler: LambdaLR, t: int) -> None:
    """Put ``scheduler`` at ``t`` and set the rates that belong there."""
    scheduler.last_epoch = t - 1
    with warnings.catch_warnings():  # torch takes a step before the first one of the optimizer for a mistake
        warnings.simplefilter("ignore", UserWarning)
        scheduler.step()
