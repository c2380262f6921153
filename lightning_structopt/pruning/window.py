"""When the ramp takes its steps."""

import math
from dataclasses import dataclass, replace

from lightning_structopt._checks import require_in, require_whole


@dataclass(frozen=True)
class RampSteps:
    """The moments at which sparsity rises: ``first``, ``first + every``, ..., ``last``.

    Args:
        first: The first moment, in epochs or optimizer steps from the start of training.
        last: The last moment, a whole number of ``every`` after ``first``.
        every: Distance between two moments.
        origin: Where the window opens, at or before ``first``: progress is counted from here.
    """

    first: int
    last: int
    every: int
    origin: float

    def as_rounds(self) -> "RampSteps":
        """Return the same moments with equal shares of the ramp, as each ends a round that is to prune."""
        return replace(self, origin=self.first - self.every)

    def reached(self, now: int) -> int | None:
        """Return the latest moment that is not after ``now``, or None before the first one."""
        if now < self.first:
            return None
        return min(now - (now - self.first) % self.every, self.last)

    def progress(self, moment: int) -> float:
        """Return how much of the ramp has passed at ``moment``: exactly 1 at the last one."""
        if moment >= self.last:
            return 1.0
        return (moment - self.origin) / (self.last - self.origin)


@dataclass(frozen=True)
class Window:
    """The part of training in which sparsity rises.

    Args:
        begin: Where it opens, as a fraction of the whole training, in [0, 1].
        end: Where it closes, likewise, after ``begin``.
        every: Epochs or optimizer steps between two steps of the ramp, at least 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of range or ``begin`` is not before ``end``.
    """

    begin: float
    end: float
    every: int

    def __post_init__(self) -> None:
        require_in("begin", self.begin, 0, 1)
        require_in("end", self.end, 0, 1)
        require_whole("every", self.every, 1)
        if self.begin >= self.end:
            raise ValueError(
                f"`begin` must be less than `end`. Found `begin = {self.begin}` and `end = {self.end}`. "
                "Both are fractions of the whole training."
            )

    def steps(self, total: float, unit: str) -> RampSteps:
        """Lay the window over a training of ``total`` epochs or optimizer steps.

        The last step of the ramp is always followed by training, so it comes before ``total`` even where
        ``end`` is 1.

        Args:
            total: Length of the training, finite.
            unit: What ``total`` counts, "epoch" or "step"; for the message.

        Raises:
            ValueError: If no moment falls in the window.
        """
        slack = 1e-9 * max(total, 1)  # 0.1 * 30 is 3.0000000000000004 and means 3
        first = math.ceil(self.begin * total - slack)
        latest = min(math.floor(self.end * total + slack), math.ceil(total) - 1)
        if latest < first:
            finer = "train for longer, or widen the window"
            remedy = f'Give `interval="step"`, {finer}.' if unit == "epoch" else f"{finer.capitalize()}."
            raise ValueError(
                f"The pruning window must hold at least one step of the ramp. Found `begin = {self.begin}`, "
                f"`end = {self.end}` over {total:g} {unit}s: no {unit} starts in it. {remedy}"
            )
        last = latest - (latest - first) % self.every
        return RampSteps(first, last, self.every, self.begin * total)
