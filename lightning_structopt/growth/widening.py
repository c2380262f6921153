"""One widening as plain data: which channels are copied, and which weights share what they read among the copies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_structopt.growth.optimizer_state import copies_along, wider_state, wider_values
from lightning_structopt.shrinking.plan import require_same_shapes
from lightning_structopt.shrinking.replacement import replace_in_place
from lightning_structopt.shrinking.surgery import set_attributes, smaller_tensor
from lightning_structopt.shrinking.tracing import tensors_of


@dataclass(frozen=True)
class Widening:
    r"""Copies channels, and divides the weights that read them by the number of copies.

    With :math:`m_i` copies of channel :math:`i`, a layer that read :math:`\sum_i W_{oi} x_i` reads
    :math:`\sum_i \sum_{k \le m_i} (W_{oi} / m_i + \epsilon_{oik}) x_i`, where :math:`\sum_k \epsilon_{oik} = 0`: the
    same, whatever the noise.

    Args:
        copies: For each parameter and buffer that grows, the old index of each new one along each dimension.
        divided: For each weight that reads channels, the dimensions along which it does.
        shapes: The shapes of these before.
        attributes: For each submodule, the attributes that have another value afterwards.
        noise: Standard deviation of the noise, relative to that of the weight.
        seed: Of the noise.
    """

    copies: Mapping[str, Mapping[int, list[int]]]
    divided: Mapping[str, list[int]]
    shapes: Mapping[str, list[int]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    noise: float = 0.0
    seed: int = 0

    @torch.no_grad()
    def grow(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Widen ``module`` where it is; its parameters stay the same objects, so that optimizers go on with them.

        Args:
            module: The module.
            optimizers: Those that move its parameters; what they remember is copied as the parameters are.

        Raises:
            ValueError: If the module has other shapes, or the state of an optimizer can't be copied. Nothing has
                changed then.
        """
        tensors = tensors_of(module)
        require_same_shapes("A widening", self.shapes, tensors)
        generator = torch.Generator().manual_seed(self.seed)
        replace_in_place(
            {name: tensors[name] for name in self.copies},
            optimizers,
            data=lambda name, tensor: self._wider(tensor, self.copies[name], self._read(name), generator),
            gradient=lambda name, gradient: wider_values(gradient, self.copies[name], self._read(name)),
            state=lambda name, state: wider_state(
                state, tensors[name].shape, self.copies[name], self._read(name)
            ),
        )
        set_attributes(module, self.attributes)

    def _wider(
        self, tensor: Tensor, dims: Mapping[int, list[int]], read: Sequence[int], generator: torch.Generator
    ) -> Tensor:
        wider = smaller_tensor(tensor, dims)
        for dim in read:
            indices = torch.tensor(dims[dim])
            wider = wider / copies_along(dim, indices, wider)
            if self.noise:
                wider += self.noise * float(wider.float().std()) * _balanced(wider, dim, indices, generator)
        return wider

    def _read(self, name: str) -> list[int]:
        return self.divided.get(name, [])


def _balanced(like: Tensor, dim: int, indices: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise that adds up to zero over the copies of each channel along ``dim``."""
    noise = torch.randn(like.shape, generator=generator)
    count = torch.bincount(indices)
    shape = list(like.shape)
    shape[dim] = len(count)
    sums = torch.zeros(shape).index_add_(dim, indices, noise)
    means = sums / count.reshape([-1 if axis == dim else 1 for axis in range(like.ndim)])
    return (noise - means.index_select(dim, indices)).to(like.device, like.dtype)
