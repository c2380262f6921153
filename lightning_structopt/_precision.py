"""Computing in enough precision, whatever comes in."""

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in at least float32, in which sums neither overflow nor stall."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
