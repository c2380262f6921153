"""Tensors of which each rank holds a part, as under FSDP2; all others are whole everywhere."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of ``tensor`` that this rank holds: all of it unless it is a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(part: Tensor, like: Tensor) -> Tensor:
    """Put the local parts of a tensor that is sharded as ``like`` is together; all ranks call it."""
    if not isinstance(like, DTensor):
        return part
    whole = DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride(), run_check=False
    )
    return whole.full_tensor()


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``whole`` under the sharding of ``like``; every rank has all of ``whole``."""
    if not isinstance(like, DTensor):
        return whole
    # Every rank has the data, so none is sent.
    return local(distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None))
