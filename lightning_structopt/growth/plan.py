"""What of a module has grown, as plain data: names, indices and numbers."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from typing_extensions import Self, override

from lightning_structopt.growth.deepening import Deepening
from lightning_structopt.growth.widening import Widening
from lightning_structopt.shrinking.saved_plan import SavedPlan, naming_what_is_there

_STEPS: dict[str, type[Widening] | type[Deepening]] = {"widening": Widening, "deepening": Deepening}


@dataclass(frozen=True)
class GrowthPlan(SavedPlan):
    """How to make the grown module of a fresh one of the same class, step by step.

    It holds names and numbers only, so it is saved as JSON, and loading one runs no code. The same plan makes the same
    module everywhere: whatever is drawn has a seed.

    Args:
        module_class: The class it was made for, ``"package.module.Class"``.
        steps: What grew, in that order.

    Example:
        >>> import torch
        >>> from lightning_structopt.growth.steps import Widen
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = Widen(1.5, "0").plan(module, torch.randn(2, 4))
        >>> plan.apply(module)[0]
        Linear(in_features=4, out_features=12, bias=True)
    """

    parts: ClassVar[str] = "`module_class` and `steps`"

    module_class: str
    steps: tuple[Widening | Deepening, ...] = ()

    def apply(self, module: nn.Module) -> nn.Module:
        """Return the grown module; ``module`` stays as it is.

        Args:
            module: A module of the class and the sizes that the plan was made for, with any weights.

        Raises:
            ValueError: If the plan is for another class or for other shapes.
        """
        grown = copy.deepcopy(module)
        self.apply_in_place(grown)
        return grown

    def apply_in_place(self, module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
        """Grow ``module`` where it is, in the middle of training.

        Parameters stay the same objects, with other data, so that whoever refers to them goes on doing so. What
        optimizers remember grows with them; parameters of new layers join the groups of those before them.

        Args:
            module: A module of the class and the sizes that the plan was made for.
            optimizers: Those that move its parameters.

        Raises:
            ValueError: If the plan is for another class or for other shapes, or an optimizer's state can't be copied.
        """
        self.require_class_of(module)
        with naming_what_is_there():
            for step in self.steps:
                step.grow(module, optimizers)

    def then(self, other: "GrowthPlan") -> "GrowthPlan":
        """Return the plan that does what this one does, and then what ``other`` does."""
        return GrowthPlan(self.module_class, (*self.steps, *other.steps))

    @override
    def _data(self) -> dict[str, Any]:
        steps = [{"step": type(step).__name__.lower(), **asdict(step)} for step in self.steps]
        return {"module_class": self.module_class, "steps": steps}

    @classmethod
    @override
    def _of_data(cls, data: Mapping[str, Any]) -> Self:
        return cls(str(data["module_class"]), tuple(_step(each) for each in data["steps"]))


def _step(data: Mapping[str, Any]) -> Widening | Deepening:
    fields = {name: value for name, value in data.items() if name != "step"}
    if "copies" in fields:  # JSON has no numbers as keys
        fields["copies"] = {
            name: {int(dim): [int(each) for each in indices] for dim, indices in dims.items()}
            for name, dims in fields["copies"].items()
        }
    if "bounds" in fields:
        fields["bounds"] = tuple(fields["bounds"])
    return _STEPS[data["step"]](**fields)
