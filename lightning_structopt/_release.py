"""Letting go of a module after training."""

from typing import Any


def release(callback: Any) -> None:
    """Remove what Lightning attached to ``callback``: bound methods that would keep the module in memory.

    Args:
        callback: A ``lightning.pytorch.Callback`` whose run is over. The next run attaches them again.
    """
    for attached in ("log", "log_dict"):
        vars(callback).pop(attached, None)
