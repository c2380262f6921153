"""How many weights there are and how many bytes they take: in memory, saved, and saved compressed."""

import io
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_structopt._dtensors import local


def count_nonzero(tensor: Tensor) -> int:
    """Count the nonzero entries; of a DTensor those of all ranks, which call it together."""
    count = (tensor.detach() != 0).sum()
    return int(count.full_tensor() if isinstance(count, DTensor) else count)


def size_bytes(tensor: Tensor) -> int:
    """Return the bytes of ``tensor``, of a DTensor over all ranks."""
    return tensor.numel() * tensor.element_size()


def own_tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Parameter], list[Tensor]]]:
    """Yield each submodule with the parameters and buffers it holds itself; what is shared counts once."""
    seen: set[int] = set()

    def new(tensors: Iterator[Tensor]) -> list[Tensor]:
        fresh = [tensor for tensor in tensors if id(tensor) not in seen]
        seen.update(map(id, fresh))
        return fresh

    for name, part in module.named_modules():
        parameters = new(iter(part.parameters(recurse=False)))
        yield name, part, parameters, new(iter(part.buffers(recurse=False)))  # type: ignore[misc]


def saved_bytes(module: nn.Module) -> tuple[int, int]:
    """Return the bytes of the state dict as ``torch.save`` writes it, and of that deflated by zlib.

    Nothing is written to disk. Sharded modules would need all ranks to put them together, so theirs is the size of
    this rank's part.
    """
    state = {
        name: local(value) if isinstance(value, Tensor) else value
        for name, value in module.state_dict().items()
    }
    sink = _Sink()
    torch.save(state, sink)  # type: ignore[arg-type]  # it only writes
    return sink.size, sink.finish()


class _Sink(io.RawIOBase):
    """Counts what is written, before and after compression, and keeps none of it."""

    def __init__(self) -> None:
        self.size = 0
        self._compressed = 0
        # Runs of zeros are all there is to find in weights; so it is thrice as fast, and no less compact.
        self._deflate = zlib.compressobj(level=1, strategy=zlib.Z_RLE)

    @override
    def writable(self) -> bool:
        return True

    @override
    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self.size += len(view)
        self._compressed += len(self._deflate.compress(view))
        return len(view)

    def finish(self) -> int:
        """Return the bytes after compression."""
        return self._compressed + len(self._deflate.flush())
