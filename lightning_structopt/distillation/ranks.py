"""Keeping adapters alike on all ranks: they are outside of the module that DDP watches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def same_on_all_ranks(trainer: Any, losses: nn.Module) -> None:
    """Give every rank the first rank's weights and buffers of ``losses``; all ranks call it together."""
    if trainer is not None and trainer.world_size > 1:
        losses.load_state_dict(trainer.strategy.broadcast(losses.state_dict()))


@torch.no_grad()
def average_gradients(trainer: Any, adapters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of ``adapters`` over ranks; all ranks call it together.

    Doing so after each batch of an accumulation gives the same as once after the last, as the average is linear, and
    gradients are alike before a scaler looks at them.
    """
    if trainer.world_size == 1:
        return
    gradients = [torch.zeros_like(a) if a.grad is None else a.grad for a in adapters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = torch.split(flat.div_(trainer.world_size), [gradient.numel() for gradient in gradients])
    for adapter, gradient, part in zip(adapters, gradients, parts, strict=True):
        adapter.grad = gradient.copy_(part.view_as(gradient))


def require_whole_adapters(trainer: Any, adapters: Sequence[nn.Parameter]) -> None:
    """Raise if adapters would train beside sharded parameters.

    Raises:
        ValueError: If the strategy shards and there are adapters.
    """
    name = "" if trainer is None else type(trainer.strategy).__name__
    if adapters and name in {"ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"}:
        raise ValueError(
            f"Adapters are whole on each rank, and one optimizer can't train them with shards. Found `{name}` and a "
            "loss with adapters. Use `ddp`, or losses without adapters (`SoftTarget`, `FeatureMSE`, "
            "`AttentionTransfer`, `RKD`)."
        )
