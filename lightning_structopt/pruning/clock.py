"""The pruning window laid over one training."""

import math
from typing import Any, Literal

from lightning_structopt._horizon import Horizon, steps_taken, training_horizon
from lightning_structopt.pruning.window import RampSteps, Window

Interval = Literal["epoch", "step"]


class Clock:
    """Tells which step of the ramp a training has reached.

    Args:
        window: The window in fractions of the training.
        interval: Whether it is laid in epochs or in optimizer steps.
        rewind_to: The fraction of the training that rounds go back to, or None if there are no rounds.
    """

    def __init__(self, window: Window, interval: Interval, rewind_to: float | None = None) -> None:
        self._window = window
        self._interval = interval
        self._rewind_to = rewind_to
        self._mark_at = 0
        self.steps = RampSteps(0, 0, 1, 0)

    def lay(self, trainer: Any) -> None:
        """Lay the window over the training of ``trainer``, which is about to start.

        Raises:
            ValueError: If that training has no length, or no step of the ramp falls in the window.
        """
        if trainer.fast_dev_run:  # one batch: go through everything in it
            self.steps, self._mark_at = RampSteps(0, 0, 1, 0), 0
            return
        total = self._total(trainer)
        self.steps = self._window.steps(total, self._interval)
        if self._rewind_to is not None:
            self.steps = self.steps.as_rounds()
            self._mark_at = math.ceil(self._rewind_to * total - 1e-9 * total)

    def reached(self, trainer: Any) -> int | None:
        """Return the latest moment of the ramp that is not after now, or None."""
        return self.steps.reached(self._now(trainer))

    def to_be_marked(self, trainer: Any) -> bool:
        """Whether the moment that rounds go back to has come."""
        return self._now(trainer) >= self._mark_at

    def round_horizon(self, trainer: Any) -> Horizon:
        """Return the length of one round of training between rewindings, which is that of the first."""
        horizon = training_horizon(trainer)
        total = self._total(trainer)
        part = self._window.steps(total, self._interval).first / total
        return Horizon(part * horizon.epochs, part * horizon.steps)

    def _now(self, trainer: Any) -> int:
        return int(trainer.current_epoch) if self._interval == "epoch" else steps_taken(trainer)

    def _total(self, trainer: Any) -> float:
        horizon = training_horizon(trainer)
        total = horizon.epochs if self._interval == "epoch" else horizon.steps
        if math.isinf(total):
            other = "step" if self._interval == "epoch" else "epoch"
            raise ValueError(
                f"The window needs the length of training in {self._interval}s. Found a loader without a length. "
                f'Give `interval="{other}"`, `max_steps`, or `limit_train_batches`.'
            )
        return total
