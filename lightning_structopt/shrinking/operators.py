"""What rules see of an operator in the graph: its name, its arguments, the labels of its tensors."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking.labels import Labelled, LabelSpace, Layer

Value: TypeAlias = "Labelled | tuple[Labelled, ...]"


def parts_of(value: Value) -> tuple[Labelled, ...]:
    """Return all tensors that a node stands for."""
    return value if isinstance(value, tuple) else (value,)


def operator_name(node: fx.Node) -> str:
    """Return the bare name of what ``node`` calls: ``add`` for ``aten.add_.Tensor``."""
    schema = getattr(node.target, "_schema", None)
    name: str = str(node.target) if schema is None else schema.name.rpartition("::")[2]
    return name if name.startswith("_") else name.rstrip("_")


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return all arguments of an ATen operator by the names in its schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def sizes_of(value: Any) -> tuple[int, ...]:
    """Return the shape of a traced tensor, symbolic sizes by what they were."""
    return tuple(concrete(size) for size in value.shape)


class UnknownSizeError(Exception):
    """A size that only the data tells."""


def concrete(size: Any) -> int:
    """Return a size as a number.

    Raises:
        UnknownSizeError: If it depends on data.
    """
    known = size if isinstance(size, int) else size.node.hint
    if known is None:
        raise UnknownSizeError
    return int(known)


def place_of(node: fx.Node) -> str:
    """Return the name of the innermost module that ran ``node``."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return str(paths[-1]) if paths else ""


class Call:
    """One operator of the graph, ready for its rule.

    Args:
        node: The operator.
        space: All labels.
        values: What is known of the nodes before it.
        constant: Returns the value of an argument that doesn't depend on data or parameters, else None.
    """

    def __init__(
        self,
        node: fx.Node,
        space: LabelSpace,
        values: dict[fx.Node, Value],
        constant: Callable[[Any], Tensor | None],
    ) -> None:
        self.node = node
        self.space = space
        self.name = operator_name(node)
        self.arguments = arguments_of(node)
        self.constant = constant
        self._values = values

    @property
    def why(self) -> str:
        """What the user is told of labels that this operator keeps."""
        place = place_of(self.node)
        return f"`{self.name}`" + (f" in `{place}`" if place else "")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, the first one if there are several."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results."""
        result = self.node.meta.get("val")
        results = result if isinstance(result, (tuple, list)) else [result]
        return [sizes_of(each) if isinstance(each, Tensor) else () for each in results]

    def tensor(self, name: str) -> Labelled:
        """Return the tensor that is given as argument ``name``."""
        value = self.of(self.arguments[name])
        assert isinstance(value, Labelled)
        return value

    def given(self, name: str) -> bool:
        """Tell whether an optional tensor is there."""
        return self.arguments.get(name) is not None

    def of(self, argument: Any) -> Value:
        """Return what is known of an argument; nothing of a plain number."""
        if isinstance(argument, fx.Node) and argument in self._values:
            return self._values[argument]
        return Labelled(())

    def know(self, argument: fx.Node, value: Labelled) -> None:
        """Take down what became known of an argument: a tensor that was made for this operator."""
        self._values[argument] = value

    def tensors(self) -> list[Labelled]:
        """Return all tensors among the arguments."""
        found: list[Labelled] = []
        for node in self.node.all_input_nodes:
            found.extend(parts_of(self._values.get(node, Labelled(()))))
        return found

    def plain(self, argument: Any) -> Any:
        """Return an argument with symbolic sizes replaced by numbers."""
        if isinstance(argument, (list, tuple)):
            return [self.plain(each) for each in argument]
        if isinstance(argument, fx.Node):
            return concrete(argument.meta["val"])
        return argument

    def dim(self, name: str = "dim", ndim: int | None = None) -> int:
        """Return argument ``name`` as a dimension counted from the front."""
        size = self.tensor("self").ndim if ndim is None else ndim
        return int(self.arguments[name]) % max(1, size)

    def dims(self, name: str = "dim") -> list[int]:
        """Return argument ``name`` as a list of dimensions; all of them if it is None or empty."""
        given = self.arguments.get(name)
        ndim = self.tensor("self").ndim
        if given is None or (isinstance(given, Sequence) and not given):
            return list(range(ndim))
        return [each % max(1, ndim) for each in (given if isinstance(given, Sequence) else [given])]

    def fix_all(self, why: str | None = None) -> Value:
        """Keep everything that enters, and return results without labels."""
        for tensor in self.tensors():
            for layer in tensor.layers:
                self.space.fix(layer.labels, why or self.why)
        return self.without_labels()

    def results(self, layers: tuple[Layer, ...]) -> Value:
        """Return as many results as there are, each with these layers."""
        results = tuple(Labelled(shape, layers) for shape in self.shapes)
        return results if isinstance(self.node.meta.get("val"), (tuple, list)) else results[0]

    def without_labels(self) -> Value:
        """Return results that are plain data."""
        return self.results(())
