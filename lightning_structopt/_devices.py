"""Where a module is, and moving a batch there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU where there is none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def moved(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with all that can be moved on ``device``; what can't be is as it was."""
    if isinstance(batch, dict) or (isinstance(batch, Mapping) and not hasattr(batch, "to")):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
