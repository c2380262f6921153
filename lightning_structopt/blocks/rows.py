"""Working on some of the samples of a batch."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_structopt._precision import widened


def over_rows(numbers: Tensor, like: Tensor) -> Tensor:
    """Return one number a row, shaped to multiply ``like``, and in its precision."""
    return numbers.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))


def as_logits(owner: str, logits: Tensor, inputs: Tensor) -> Tensor:
    """Return what a gate gave as one number a sample, in at least float32.

    Raises:
        ValueError: If it is not one a sample.
    """
    rows = inputs.shape[0]  # not `len`, which would make the size of a batch a constant in exported graphs
    if logits.numel() != rows or logits.shape[0] != rows or logits.ndim > 2:
        raise ValueError(
            f"The gate of `{owner}` must give one logit a sample, of shape ({rows},). Found {tuple(logits.shape)}. End "
            "it with a linear layer of one output, or take `Gate(features)`."
        )
    return widened(logits.reshape(-1))


def needs_dense_form() -> bool:
    """Tell whether a graph is being recorded for export, which can have no branches that depend on data."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def has_shards(module: nn.Module) -> bool:
    """Tell whether ``module`` holds weights that only all ranks together can gather, so that all must call it."""
    # Almost always so, and far quicker to ask than all weights.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def touch(module: nn.Module) -> Tensor | None:
    """Return a zero through which all parameters get gradients of zero, for a pass in which ``module`` did not run.

    DDP waits for the gradient of every parameter, and optimizers with weight decay skip those that have none.
    Empty slices, so that neither time nor weights that are not finite count.
    """
    parts = [p.flatten()[:0].sum() for p in module.parameters() if p.requires_grad]
    return torch.stack([part.float() for part in parts]).sum() if parts else None


def require_same_shape(owner: str, through: Tensor, around: Tensor) -> None:
    """Raise unless what comes through the body has the shape of what goes around it.

    Raises:
        ValueError: If it hasn't.
    """
    if through.shape != around.shape:
        raise ValueError(
            f"The body of `{owner}` must give the shape of its shortcut. Found {tuple(through.shape)} from the body "
            f"and {tuple(around.shape)} around it. Give a `shortcut` that changes the shape alike, such as "
            "`projection(in_channels, out_channels, stride)`."
        )
