"""Weights seen with one row for each output, as patterns of rows and columns take them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_structopt.pruning.sharding import Sharding

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Outputs:
    """Where weights have their outputs: in the first dimension, except those of transposed convolutions.

    Their weights are (inputs, outputs / groups, *kernel), group after group of inputs.

    Args:
        groups: By name, the number of groups of each weight of a transposed convolution.

    Example:
        >>> layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
        >>> Outputs.of(layer, layer.state_dict()).first("weight", layer.weight).shape
        torch.Size([4, 3, 3, 3])
    """

    groups: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, names: Mapping[str, Tensor]) -> "Outputs":
        """Look up the layers of ``module`` that hold the parameters of these ``names``.

        Raises:
            ValueError: If a weight of a transposed convolution is sharded, as its outputs are then on all ranks.
        """
        layers = {name: module.get_submodule(name.rpartition(".")[0]) for name in names}
        groups = {name: layer.groups for name, layer in layers.items() if isinstance(layer, TRANSPOSED)}
        for name in Sharding.of(names).sharded:
            if name in groups:
                raise ValueError(
                    "A pattern of outputs needs each output whole on one rank. Found that FSDP2 shards the inputs of "
                    f"`{name}`, a `{type(layers[name]).__name__}`. Give `exclude = {name!r}`, use `Unstructured`, or "
                    "leave that layer out of `fully_shard`."
                )
        return cls(groups)

    def count(self, name: str, weight: Tensor) -> int:
        """Return the number of outputs."""
        return weight.shape[1] * self.groups[name] if name in self.groups else weight.shape[0]

    def first(self, name: str, weight: Tensor) -> Tensor:
        """Return ``weight`` as (outputs, inputs / groups, *kernel); itself if it is so already."""
        if name not in self.groups:
            return weight
        return outputs_first(weight, self.groups[name])

    def back(self, name: str, rows: Tensor) -> Tensor:
        """Return what :meth:`first` returned in the shape that the layer has it in."""
        if name not in self.groups:
            return rows
        grouped = rows.reshape(self.groups[name], -1, *rows.shape[1:])
        return grouped.transpose(1, 2).flatten(0, 1).contiguous()


def outputs_first(weight: Tensor, groups: int) -> Tensor:
    """Return the weight of a transposed convolution as (outputs, inputs / groups, *kernel)."""
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)
