"""Learning rates of a trainer's optimizers: that there are some, and schedules put where training is."""

import warnings
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override


class OwnGroupsLR(LambdaLR):
    """A ``LambdaLR`` that leaves those parameter groups alone which join its optimizer later.

    Whoever adds a group while training, as Lightning's ``BackboneFinetuning`` does, sets its rate.
    """

    @override
    def get_lr(self) -> list[float | Tensor]:
        later = self.optimizer.param_groups[len(self.base_lrs) :]
        return [*super().get_lr(), *(group["lr"] for group in later)]

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # In a resumed training later groups may be there from the start.
        del self.lr_lambdas[len(self.base_lrs) :]


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


def require_free_rates(owner: str, trainer: Any) -> None:
    """Raise unless the trainer has learning rates that nothing else sets.

    Args:
        owner: The callback that wants to set them.
        trainer: The trainer that called it.

    Raises:
        ValueError: If there is a scheduler, or there are no rates.
    """
    for config in trainer.lr_scheduler_configs:
        kind = type(config.scheduler)
        name = "LambdaLR" if kind is OwnGroupsLR else kind.__name__
        raise ValueError(
            f"The learning rate must have one owner. Found `{owner}` and a `{name}`, of `configure_optimizers` or "
            "another callback. Remove one of them."
        )
    require_rates(owner, trainer)


def move(scheduler: LambdaLR, t: int) -> None:
    """Put ``scheduler`` at ``t`` and set the rates that belong there."""
    scheduler.last_epoch = t - 1
    with warnings.catch_warnings():  # torch takes a step before the first one of the optimizer for a mistake
        warnings.simplefilter("ignore", UserWarning)
        scheduler.step()
