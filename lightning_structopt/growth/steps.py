"""Steps of growth as values: what `NetworkGrowth` does when it is time."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_type, require_whole
from lightning_structopt.growth.deepen_plan import plan_deepening
from lightning_structopt.growth.deepening import DeepenKind
from lightning_structopt.growth.plan import GrowthPlan
from lightning_structopt.growth.widen_plan import plan_widening
from lightning_structopt.shrinking.saved_plan import class_name


class GrowthStep(ABC):
    """One step of growth: it makes a plan for a module, and the plan makes the grown module."""

    @abstractmethod
    def plan(self, module: nn.Module, example_input: Any) -> GrowthPlan:
        """Return the plan for ``module``, which stays as it is.

        Args:
            module: The module.
            example_input: What its ``forward`` takes, a tuple for several.
        """

    def saved_plan(self, path: str | Path) -> GrowthPlan:
        """Return the plan in a file that :meth:`GrowthPlan.save` wrote.

        Args:
            path: The file.
        """
        return GrowthPlan.load(path)

    def apply(self, module: nn.Module, example_input: Any) -> nn.Module:
        """Return the grown module; ``module`` stays as it is. What is drawn comes from the seed of the step.

        Args:
            module: The module.
            example_input: What its ``forward`` takes, a tuple for several.
        """
        return self.plan(module, example_input).apply(module)


@dataclass(frozen=True)
class Widen(GrowthStep):
    """Copies channels, heads and neurons, as :func:`widen` does.

    Args:
        factor: How many times as many there shall be; above 1.
        name: Of a layer, whose outputs grow, or of a block, in which all grows that is within it alone and can. By
            default the module itself.
        noise: Standard deviation of what tells copies apart, relative to that of the weights that read them. Without
            any, copies learn the same forever (but for dropout).
        seed: Of which are copied once more if ``factor`` is not whole, and of the noise.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> Widen(1.5).apply(module, torch.randn(2, 4))[2]
        Linear(in_features=12, out_features=2, bias=True)
    """

    factor: float
    name: str = ""
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        require_in("factor", self.factor, 1, math.inf, closed="neither")
        require_type("name", self.name, str)
        require_in("noise", self.noise, 0, math.inf, closed="left")
        require_whole("seed", self.seed, 0)
        if math.isinf(self.factor):
            raise ValueError("`factor` must be in (1, inf). Found `factor = inf`.")

    @override
    def plan(self, module: nn.Module, example_input: Any) -> GrowthPlan:
        require_type("module", module, nn.Module)
        step = plan_widening(module, self.name, self.factor, example_input, self.noise, self.seed)
        return GrowthPlan(class_name(module), (step,))


@dataclass(frozen=True)
class Deepen(GrowthStep):
    """Adds a layer that gives back its input, as :func:`deepen` does.

    Args:
        after: The part that it follows; by default the last one next to an activation that permits it.
        kind: ``"identity"`` (a layer and ReLU, next to a ReLU) or ``"residual"`` (anywhere).
        kernel_size: Of convolutions; odd.
        norm: Whether a residual block has batch norms.
        seed: Of the weights of a residual block.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> Deepen().apply(module, torch.randn(2, 4))[1][1][0]
        Linear(in_features=8, out_features=8, bias=True)
    """

    after: str | None = None
    kind: DeepenKind = "identity"
    kernel_size: int = 3
    norm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.after is not None:
            require_type("after", self.after, str)
        require_choice("kind", self.kind, ("identity", "residual"))
        require_whole("kernel_size", self.kernel_size, 1)
        require_type("norm", self.norm, bool)
        require_whole("seed", self.seed, 0)
        if self.kernel_size % 2 == 0:
            raise ValueError(
                "`kernel_size` must be odd, so that an image keeps its size. Found "
                f"`kernel_size = {self.kernel_size}`."
            )

    @override
    def plan(self, module: nn.Module, example_input: Any) -> GrowthPlan:
        require_type("module", module, nn.Module)
        step = plan_deepening(
            module, self.after, example_input, self.kind, self.kernel_size, self.norm, self.seed
        )
        return GrowthPlan(class_name(module), (step,))
