"""How much the task and how much the teacher counts."""

import math
from dataclasses import dataclass

from lightning_structopt._checks import require_in, require_type
from lightning_structopt.schedules import Schedule


@dataclass(frozen=True)
class Balance:
    r"""Factors on the task's loss and on the distillation loss: :math:`(1 - \alpha, \alpha)`, or :math:`(1, w)`.

    Args:
        alpha: The teacher's share :math:`\alpha`, in [0, 1]; None for 0.5 where there is no ``weight``.
        weight: The factor :math:`w` beside a task that counts in full, in [0, inf); None for a share.
        schedule: What ``alpha`` or ``weight`` is multiplied by, over optimizer steps; None keeps it.

    Raises:
        ValueError: If one is out of range, or both ``alpha`` and ``weight`` are given.
        TypeError: If ``schedule`` is not a schedule.

    Example:
        >>> Balance(alpha=0.75).factors(0, horizon=10), Balance(weight=2.0).factors(0, horizon=10)
        ((0.25, 0.75), (1.0, 2.0))
    """

    alpha: float | None = None
    weight: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and self.weight is not None:
            raise ValueError(
                "The teacher counts by a share or by a weight. Found `alpha = "
                f"{self.alpha}` and `weight = {self.weight}`. Give one of them."
            )
        if self.weight is not None:
            require_in("weight", self.weight, 0, math.inf, closed="left")
        else:
            require_in("alpha", self._share, 0, 1)
        if self.schedule is not None:
            require_type("schedule", self.schedule, Schedule)

    @property
    def _share(self) -> float:
        return 0.5 if self.alpha is None else self.alpha

    def factors(self, t: float, horizon: float) -> tuple[float, float]:
        """Return the factors on task and distillation.

        Args:
            t: Steps done so far, at least 0.
            horizon: Steps until training ends; ``math.inf`` where nothing bounds it.
        """
        now = 1.0 if self.schedule is None else self.schedule(t, horizon)
        if self.weight is not None:
            return 1.0, self.weight * now
        return 1 - self._share * now, self._share * now


def require_horizon(schedules: list[Schedule], horizon: float) -> None:
    """Raise if one of ``schedules`` needs an end of training and there is none.

    Raises:
        ValueError: If so.
    """
    endless = [schedule for schedule in schedules if schedule.needs_horizon]
    if endless and math.isinf(horizon):
        raise ValueError(
            f"`{endless[0]!r}` needs to know how many steps training takes. Found neither `max_steps` nor `max_epochs` "
            "with a loader that has a length. Give the trainer `max_steps`, or take a schedule without a horizon, "
            "such as `Exponential`."
        )
