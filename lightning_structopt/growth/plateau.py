"""When to grow: once a metric stops getting better."""

import math
from dataclasses import dataclass
from typing import Literal

from lightning_structopt._checks import require_choice, require_in, require_type, require_whole


@dataclass(frozen=True)
class Plateau:
    """Growth is due when a metric has not improved for some epochs.

    Args:
        monitor: The name that the metric is logged under.
        mode: Whether ``"min"`` or ``"max"`` is better.
        patience: Epochs without improvement, at least 1; epochs without validation don't count where there is one.
        min_delta: What counts as an improvement must be more than this.
        times: How often to grow at most.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> plateau = Plateau("val_loss", patience=2)
        >>> plateau.observe(best=0.5, waited=1, value=0.6)
        (0.5, 2)
        >>> plateau.observe(best=0.5, waited=1, value=0.4)
        (0.4, 0)
    """

    monitor: str
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0
    times: int = 1

    def __post_init__(self) -> None:
        require_type("monitor", self.monitor, str)
        require_choice("mode", self.mode, ("min", "max"))
        require_whole("patience", self.patience, 1)
        require_in("min_delta", self.min_delta, 0, math.inf, closed="left")
        require_whole("times", self.times, 1)

    def observe(self, best: float | None, waited: int, value: float) -> tuple[float, int]:
        """Return the best value and the epochs without a better one, once another value is known.

        Args:
            best: The best value so far; None if there is none.
            waited: Epochs without a better one.
            value: The new one. NaN is never better.
        """
        if best is None or math.isnan(best):
            return value, 0
        gain = best - value if self.mode == "min" else value - best
        return (value, 0) if gain > self.min_delta else (best, waited + 1)
