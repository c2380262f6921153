"""Pickles with their tensors and arrays beside them in one file, which is mapped into memory and not read.

Every trial loads the data of its sweep. Mapped, they take no time, and trials on one machine share their memory. A
plain pickle of a tensor is copied three times, and holds all of its storage, also where the tensor is a part of it.
"""

import io
import json
import mmap
import pickle
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt._files import as_a_whole

_ALIGNED = 64  # bytes, as torch allocates
_SMALL = 1024  # bytes, below which a tensor is not worth a place of its own


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    @override
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and _is_plain(obj):
            flat: Any = obj.contiguous().reshape(-1).view(torch.uint8).numpy()
            return _tensor, (pickle.PickleBuffer(flat), obj.dtype, tuple(obj.shape))
        return super().reducer_override(obj)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether nothing but numbers makes up a tensor, and enough of them."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and not vars(tensor)
        and tensor.numel() * tensor.element_size() >= _SMALL
    )


def _tensor(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def dump(content: Any, path: Path) -> None:
    """Write ``content`` to ``path``, as a whole or not at all: others may be reading."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=5, buffer_callback=buffers.append).dump(content)
    parts = [memoryview(pickled.getbuffer()), *(buffer.raw() for buffer in buffers)]
    with as_a_whole(path) as beside, beside.open("wb") as file:
        file.write(json.dumps([len(part) for part in parts]).encode() + b"\n")
        for part in parts:
            file.write(b"\0" * (-file.tell() % _ALIGNED))
            file.write(part)


def load(path: Path) -> Any:
    """Read what :func:`dump` wrote, which may run any code. Who writes into what is mapped has a copy of that part."""
    with path.open("rb") as file:
        lengths = json.loads(file.readline())
        place = file.tell()
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    parts = []
    for length in lengths:
        place += -place % _ALIGNED
        parts.append(view[place : place + length])
        place += length
    return pickle.loads(parts[0], buffers=parts[1:])
