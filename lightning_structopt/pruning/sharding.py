"""Counting weights that are spread over ranks, as under FSDP2."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Sharding:
    """Which parameters are sharded over which ranks.

    Args:
        mesh: The ranks that share the parameters; None in a single process and where every rank holds all.
        sharded: Names of the parameters of which each rank holds a part. The others are the same everywhere
            and are counted by the first rank alone.
        shapes: Shapes of the whole parameters by name; those that are missing are as this rank has them.
    """

    mesh: DeviceMesh | None = None
    sharded: frozenset[str] = frozenset()
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> "Sharding":
        """Read the sharding off ``parameters``.

        Raises:
            ValueError: If they are sharded over meshes that differ or have several dimensions.
        """
        sharded = {
            name: parameter
            for name, parameter in parameters.items()
            if isinstance(parameter, DTensor) and any(isinstance(p, Shard) for p in parameter.placements)
        }
        meshes = list(dict.fromkeys(parameter.device_mesh for parameter in sharded.values()))
        if len(meshes) > 1 or any(mesh.ndim > 1 for mesh in meshes):
            raise ValueError(
                "Pruned parameters must be sharded over one device mesh of one dimension. Found "
                f"{', '.join(map(str, meshes))}. Use FSDP2 without tensor parallelism (`tensor_parallel_size=1`)."
            )
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        return cls(meshes[0] if meshes else None, frozenset(sharded), shapes)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks, or None where there is nothing to exchange."""
        return self.mesh.get_group() if self.mesh is not None else None

    def counts(self, name: str) -> bool:
        """Whether this rank counts parameter ``name``."""
        return self.mesh is None or name in self.sharded or self.mesh.get_local_rank() == 0

    def total(self, numbers: Iterable[int]) -> int:
        """Return the sum of ``numbers`` over all ranks."""
        number = sum(numbers)
        if self.mesh is None:
            return number
        tensor = torch.tensor([number], device=self.mesh.device_type)
        dist.all_reduce(tensor, group=self.group)
        return int(tensor.item())

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """Return the ``numbers`` of every rank, in order of rank."""
        if self.mesh is None:
            return [numbers]
        mine = torch.tensor(numbers, device=self.mesh.device_type)
        everyone = [torch.empty_like(mine) for _ in range(self.mesh.size())]
        dist.all_gather(everyone, mine, group=self.group)
        return [numbers.tolist() for numbers in everyone]

    def leads(self, name: str, value: float) -> bool:
        """Whether this rank's ``value`` for parameter ``name`` is the largest; of equal ones the first is."""
        if self.mesh is None or name not in self.sharded:
            return True
        mine = torch.tensor([value], dtype=torch.float64, device=self.mesh.device_type)
        everyone = [torch.empty_like(mine) for _ in range(self.mesh.size())]
        dist.all_gather(everyone, mine, group=self.group)
        return int(torch.cat(everyone).argmax()) == self.rank

    @property
    def rank(self) -> int:
        """This process's place among the ranks."""
        return 0 if self.mesh is None else self.mesh.get_local_rank()


WHOLE = Sharding()
