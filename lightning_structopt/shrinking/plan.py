"""What of a module is kept, as plain data: names and indices."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_structopt.shrinking.graph_form import smaller_graph
from lightning_structopt.shrinking.saved_plan import SavedPlan, naming_what_is_there
from lightning_structopt.shrinking.surgery import set_attributes, smaller_copy
from lightning_structopt.shrinking.tracing import tensors_of


@dataclass(frozen=True)
class ShrinkPlan(SavedPlan):
    """How to make a smaller module of a fresh one of the same class.

    It holds names and numbers only, so it is saved as JSON, and loading one runs no code.

    Args:
        module_class: The class it was made for, ``"package.module.Class"``.
        kept: For each parameter and buffer that gets smaller, the indices that are kept along each dimension.
        shapes: The shapes of these before.
        attributes: For each submodule, the attributes that have another value afterwards.
        form: ``"module"`` where the smaller module is of the same class; ``"graph"`` where sizes are written
            into code, so that only the exported graph can be made smaller.

    Example:
        >>> plan = ShrinkPlan(
        ...     "torch.nn.modules.linear.Linear", {"weight": {1: [0, 2]}}, {"weight": [2, 3]}, {"": {"in_features": 2}}
        ... )
        >>> plan.apply(nn.Linear(3, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """

    parts: ClassVar[str] = "`module_class`, `kept`, `shapes`, `attributes` and `form`"

    module_class: str
    kept: Mapping[str, Mapping[int, list[int]]]
    shapes: Mapping[str, list[int]]
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    form: Literal["module", "graph"] = "module"

    def apply(self, module: nn.Module, example_input: Any = None) -> nn.Module:
        """Return the smaller module; ``module`` stays as it is.

        Args:
            module: A module of the class and the sizes that the plan was made for, with any weights.
            example_input: What its ``forward`` takes, a tuple for several; needed for ``form="graph"``.

        Raises:
            ValueError: If the plan is for another class, for other shapes, or needs an example input.
        """
        self.require_fits(module)
        if self.form == "graph":
            if example_input is None:
                raise ValueError(
                    'A plan with `form="graph"` shrinks the exported graph, which needs an example input. Found '
                    "none. Give `apply` an `example_input`."
                )
            return smaller_graph(module, as_tuple(example_input), self.kept)
        with naming_what_is_there():
            small = smaller_copy(module, self.kept)
            set_attributes(small, self.attributes)
        return small

    def require_fits(self, module: nn.Module) -> None:
        """Raise unless ``module`` is of the class and the sizes that the plan was made for.

        Raises:
            ValueError: If it isn't.
        """
        self.require_class_of(module)
        require_same_shapes("A plan", self.shapes, tensors_of(module))

    def is_done(self, module: nn.Module) -> bool:
        """Tell whether ``module`` has the shapes that it has after :meth:`apply`."""
        tensors = tensors_of(module)
        return all(
            name in tensors and list(tensors[name].shape) == shape
            for name, shape in self.small_shapes().items()
        )

    def small_shapes(self) -> dict[str, list[int]]:
        """Return the shapes of parameters and buffers afterwards."""
        with naming_what_is_there():
            return {
                name: [len(self.kept[name].get(dim, range(size))) for dim, size in enumerate(shape)]
                for name, shape in self.shapes.items()
            }

    @override
    def _data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    @override
    def _of_data(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            module_class=str(data["module_class"]),
            kept={
                name: {int(dim): [int(each) for each in indices] for dim, indices in dims.items()}
                for name, dims in data["kept"].items()
            },
            shapes={name: [int(size) for size in shape] for name, shape in data["shapes"].items()},
            attributes={path: dict(values) for path, values in data["attributes"].items()},
            form="graph" if data["form"] == "graph" else "module",
        )


def require_same_shapes(
    what: str, shapes: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]
) -> None:
    """Raise unless tensors have the shapes that they had.

    Args:
        what: What was made for these shapes.
        shapes: The shapes by name.
        tensors: The tensors by name; others don't count.

    Raises:
        ValueError: If one is missing or has another shape.
    """
    for name, shape in shapes.items():
        found = list(tensors[name].shape) if name in tensors else "none"
        if found != list(shape):
            raise ValueError(
                f"{what} fits modules of the sizes that it was made for: `{name}` of shape {list(shape)}. Found "
                f"{found}. Make the module with the arguments that it had, and don't shrink it twice."
            )


def as_tuple(example_input: Any) -> tuple[Any, ...]:
    """Return an example input as the arguments of ``forward``."""
    return tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,)
