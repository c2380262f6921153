"""A teacher too big for one device, in shards (FSDP2)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(teacher: nn.Module, mesh: Any, device: torch.device) -> None:
    """Divide the weights of ``teacher`` among ranks, block by block; once, however often it is called.

    Each block's weights are put together when it runs and let go after it, so a rank never holds more than its share
    and one block.

    Args:
        teacher: The model; all ranks hold the same.
        mesh: The strategy's device mesh, or None where it has none.
        device: Where the parts that no rank shares are to be.

    Raises:
        ValueError: If the strategy has no mesh.
    """
    if mesh is None:
        raise ValueError(
            "`shard_teacher=True` divides the teacher as `ModelParallelStrategy` divides the student. Found another "
            "strategy. Use that one (FSDP2), or leave `shard_teacher` out."
        )
    if not isinstance(teacher, FSDPModule):
        names = mesh.mesh_dim_names or ()
        shards = mesh["data_parallel"] if "data_parallel" in names else mesh
        for block in _blocks(teacher):
            fully_shard(block, mesh=shards, reshard_after_forward=True)
        fully_shard(teacher, mesh=shards, reshard_after_forward=True)
        teacher.to(device)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost lists of modules: the layers of most networks."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from _blocks(child)
