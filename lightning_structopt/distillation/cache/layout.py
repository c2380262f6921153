"""What a row of a teacher cache is made of."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_structopt.distillation.cache.encoding import name_of
from lightning_structopt.distillation.cache.memory_maps import Bytes


@dataclass(frozen=True)
class Part:
    """A stretch of a row.

    Args:
        output: Name of the output that it belongs to.
        name: What it is of that output.
        dtype: Type of its numbers, as ``float16``.
        shape: Of one sample.
    """

    output: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of its numbers."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def size_bytes(self) -> int:
        """Its bytes in a row."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """The outputs that are kept of each sample, in the order of a row.

    Args:
        shapes: Names of outputs and their shapes, of one sample.
        parts: What they are made of.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor], encoded: Mapping[str, Mapping[str, Tensor]]) -> "Layout":
        """Return the layout of these ``outputs``, whose rows are made of their ``encoded`` parts."""
        names = sorted(outputs)
        return cls(
            tuple((name, tuple(outputs[name].shape[1:])) for name in names),
            tuple(
                Part(name, part, name_of(tensor.dtype), tuple(tensor.shape[1:]))
                for name in names
                for part, tensor in encoded[name].items()
            ),
        )

    @classmethod
    def from_json(cls, plain: Any) -> "Layout":
        """Return the layout that :meth:`to_json` made ``plain`` of."""
        return cls(
            tuple((name, tuple(shape)) for name, shape in plain["shapes"]),
            tuple(Part(**{**part, "shape": tuple(part["shape"])}) for part in plain["parts"]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain data."""
        return {
            "shapes": [list(each) for each in self.shapes],
            "parts": [asdict(part) for part in self.parts],
        }

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return sum(part.size_bytes for part in self.parts)

    def pack(self, encoded: Mapping[str, Mapping[str, Tensor]]) -> Bytes:
        """Return rows of bytes, (N, ``row_bytes``)."""
        tensors = [encoded[part.output][part.name] for part in self.parts]
        rows = [tensor.detach().cpu().reshape(len(tensor), -1).contiguous() for tensor in tensors]
        return np.ascontiguousarray(torch.cat([row.view(torch.uint8) for row in rows], 1).numpy())

    def unpack(self, rows: Bytes, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """Return the parts of each output, on ``device``, from rows of bytes."""
        whole = torch.from_numpy(rows)
        parts: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self.shapes}
        start = 0
        for part in self.parts:
            piece = whole[:, start : start + part.size_bytes].clone(memory_format=torch.contiguous_format)
            parts[part.output][part.name] = (
                piece.view(part.torch_dtype).reshape(len(rows), *part.shape).to(device, non_blocking=True)
            )
            start += part.size_bytes
        return parts

    @property
    def described(self) -> str:
        """Names and shapes, for people."""
        return ", ".join(f"`{name}` of shape {shape}" for name, shape in self.shapes)
