"""How the sparsity of a model is shared among its layers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import override

from lightning_structopt._checks import require_in, require_mapping, require_type


class Distribution(ABC):
    """A rule that gives every layer a sparsity so that together they have the one asked for."""

    @abstractmethod
    def share(self, shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
        """Share ``sparsity`` out.

        Args:
            shapes: Shapes of the weights by parameter name.
            sparsity: Fraction of all weights to be zero, in [0, 1).

        Returns:
            The sparsity of each parameter, in [0, 1); their mean, weighted by size, is ``sparsity``.
        """


@dataclass(frozen=True)
class Uniform(Distribution):
    """The same sparsity for every layer.

    Example:
        >>> Uniform().share({"a": (2, 8), "b": (4, 4)}, 0.5)
        {'a': 0.5, 'b': 0.5}
    """

    @override
    def share(self, shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
        return dict.fromkeys(shapes, sparsity)


@dataclass(frozen=True)
class ErdosRenyi(Distribution):
    r"""Large layers get sparser, density :math:`\propto \frac{n_{in} + n_{out}}{n_{in} n_{out}}`.

    With ``kernel`` (ERK) a convolution counts its kernel too:
    :math:`\frac{n_{in} + n_{out} + w + h}{n_{in} n_{out} w h}`. Layers whose density would pass 1 stay dense
    and the others make up for it.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (2018);
    Evci et al., "Rigging the Lottery" (2020).

    Args:
        kernel: Whether the kernel's size counts (ERK) or only channels do (ER).

    Example:
        >>> shares = ErdosRenyi().share({"small": (10, 10), "large": (100, 100)}, 0.9)
        >>> {name: round(share, 3) for name, share in shares.items()}
        {'small': 0.082, 'large': 0.908}
    """

    kernel: bool = True

    def __post_init__(self) -> None:
        require_type("kernel", self.kernel, bool)

    @override
    def share(self, shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        raw = {name: self._raw_density(shape) for name, shape in shapes.items()}
        dense: set[str] = set()
        scale = 0.0
        while len(dense) < len(shapes):
            left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
            scale = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
            saturated = {name for name in shapes if name not in dense and scale * raw[name] > 1}
            if not saturated:
                break
            dense |= saturated
        return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in shapes}

    def _raw_density(self, shape: tuple[int, ...]) -> float:
        counted = shape if self.kernel else shape[:2]
        return sum(counted) / math.prod(counted)


@dataclass(frozen=True)
class PerLayer(Distribution):
    """Sparsities given by hand, or found by :func:`~lightning_structopt.sensitivity`.

    While the ramp is below its target, all layers are at the same part of theirs.

    Args:
        sparsities: The final sparsity of every pruned parameter by name, each in [0, 1).

    Raises:
        ValueError: If a sparsity is out of range. In ``fit``: if the names are not those of the pruned
            parameters, or their mean, weighted by size, is less than the target.
    """

    sparsities: Mapping[str, float]

    def __post_init__(self) -> None:
        require_mapping("sparsities", self.sparsities)
        for name, sparsity in self.sparsities.items():
            require_in(f"sparsities[{name!r}]", sparsity, 0, 1, closed="left")

    @override
    def __hash__(self) -> int:
        return hash(tuple(sorted(self.sparsities.items())))

    @override
    def share(self, shapes: Mapping[str, tuple[int, ...]], sparsity: float) -> dict[str, float]:
        if differing := set(shapes) ^ set(self.sparsities):
            raise ValueError(
                f"`sparsities` must name the pruned parameters. Found a difference at {sorted(differing)[0]!r}."
            )
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        final = sum(self.sparsities[name] * size for name, size in sizes.items()) / sum(sizes.values())
        if sparsity > final + 0.5 / min(sizes.values()):
            raise ValueError(
                f"The mean of `sparsities`, weighted by size, must be the target. Found {final:.6f} for a target of "
                f"{sparsity}. Set `sparsity={final:.6f}`."
            )
        part = sparsity / final if final else 0.0
        return {name: min(part, 1.0) * self.sparsities[name] for name in shapes}
