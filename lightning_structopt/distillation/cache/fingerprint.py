"""Telling one teacher from another."""

import hashlib
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_structopt._dtensors import full, local


def fingerprint(teacher: nn.Module) -> str:
    """Return what identifies a teacher: a hash of its classes, names, parameters and buffers.

    It is the same on every device, in every process, and for a module that is compiled or sharded. Where the teacher
    is sharded, all ranks call it.

    Args:
        teacher: Any module that is not on the meta device.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: If there is a parameter without data.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> _ = layer.bias.data.add_(1)
        >>> fingerprint(layer) == before
        False
    """
    digest = hashlib.sha256()
    teacher = getattr(teacher, "_orig_mod", teacher)  # of what `torch.compile` returned
    for name, part in teacher.named_modules():
        digest.update(f"{name}:{_class_name(part)};".encode())
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"A teacher needs weights. Found `{name}` on the meta device. Load them first.")
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _class_name(part: nn.Module) -> str:
    # `fully_shard` puts a class of its own before that of the module.
    return next(kind.__qualname__ for kind in type(part).__mro__ if not issubclass(kind, FSDPModule))


@torch.no_grad()
def _bytes_of(tensor: Tensor) -> memoryview:
    whole = full(local(tensor), like=tensor).cpu().contiguous()
    return whole.flatten().view(torch.uint8).numpy().data
