"""Running a module's graph on labels: which dimensions of which parameters stand for the same thing."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_structopt._undisturbed import without_autocast
from lightning_structopt.shrinking.exporting import export, line_of_node
from lightning_structopt.shrinking.labels import Labelled, LabelSpace, Layer
from lightning_structopt.shrinking.operators import (
    Call,
    UnknownSizeError,
    Value,
    operator_name,
    parts_of,
    place_of,
    sizes_of,
)
from lightning_structopt.shrinking.rules import rule_for


@dataclass(frozen=True)
class Origin:
    """Where labels come from: one dimension of a parameter or buffer.

    Args:
        name: Of the parameter or buffer.
        dim: The dimension.
        first: The label of index 0; those of the others follow.
        size: How many there are.
    """

    name: str
    dim: int
    first: int
    size: int


@dataclass(frozen=True)
class Trace:
    """A module's graph with labels on every tensor.

    Args:
        program: The exported graph.
        values: The labels of each node.
        space: All labels.
        origins: Where they come from.
        unknown: Operators without a rule, each with a module that runs it.
        unused: Labels of what no operator takes.
    """

    program: torch.export.ExportedProgram
    values: Mapping[fx.Node, Value]
    space: LabelSpace
    origins: tuple[Origin, ...]
    unknown: Mapping[str, str]
    unused: Tensor


def trace(module: nn.Module, inputs: tuple[Any, ...], training: bool = False) -> Trace:
    """Trace ``module`` and run the graph on labels.

    Args:
        module: What to trace; left as it is.
        inputs: The arguments of its ``forward``.
        training: Trace the way it runs in training.

    Raises:
        ValueError: If it can't be traced.
    """
    with without_autocast() as regions:  # which would be graphs of their own
        try:
            return walk(module, export(module, inputs, training))
        except ValueError:
            if not regions:
                raise
    return walk(module, export(module, inputs, training))  # in which types fit together only by autocast


def walk(module: nn.Module, program: torch.export.ExportedProgram) -> Trace:
    """Run the graph of ``module`` on labels."""
    return _Walk(module, program).run()


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, those that are shared once, under their first name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


class _Walk:
    """One pass over a graph."""

    def __init__(self, module: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.space = LabelSpace()
        self.values: dict[fx.Node, Value] = {}
        self.unknown: dict[str, str] = {}
        self._tensors = tensors_of(module)
        self._first_name = {id(tensor): name for name, tensor in reversed(list(self._tensors.items()))}
        self._module = module
        self._origins: dict[str, list[Origin]] = {}
        self._sources: dict[fx.Node, str] = {}  # parameters and buffers that are read
        self._constants: dict[fx.Node, Tensor | None] = {}
        signature = program.graph_signature
        self._names: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}

    def run(self) -> Trace:
        """Walk, and return what was found.

        Raises:
            ValueError: If a size depends on data.
        """
        for node in self.program.graph.nodes:
            try:
                self.values[node] = self._value(node)
            except UnknownSizeError as error:
                raise ValueError(
                    "Shrinking needs sizes that don't depend on data. Found "
                    f"`{operator_name(node)}`{line_of_node(node)}, which gives as many elements as the data has. Let "
                    "it give a fixed number (`torch.where`, a mask that is multiplied), or move it out of `forward`."
                ) from error
            self._keep_up(node)
        for name, tensor in self._tensors.items():
            if name not in self._origins:
                self._label(name, tensor)
        origins = tuple(each for mine in self._origins.values() for each in mine)
        return Trace(self.program, self.values, self.space, origins, self.unknown, self._unused())

    def _unused(self) -> Tensor:
        unused = torch.ones(self.space.size, dtype=torch.bool)
        for node, name in self._sources.items():
            parts = self._read(node)
            for origin in self._origins[name]:
                if parts is None or origin.size == 1:
                    unused[origin.first : origin.first + origin.size] = False
            for labels in parts or ():
                unused[labels] = False
        unused[0] = False
        return unused.nonzero()[:, 0]

    def _read(self, node: fx.Node) -> list[Tensor] | None:
        """Return the labels of those parts of a tensor that are read, if it is by slices alone; None if all are.

        What no slice reads of a table of positions is read with longer inputs.
        """
        parts: list[Tensor] = []
        for user in node.users:
            if operator_name(user) != "slice":
                return None
            own = self._read(user)
            layers = (layer for part in parts_of(self.values[user]) for layer in part.layers)
            parts += [layer.labels.reshape(-1) for layer in layers] if own is None else own
        return parts

    def _value(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return self._input(node)
        if node.op == "output":
            return self._output(node)
        if node.op != "call_function":
            return self._data(node)
        if node.target is operator.getitem:
            source = self.values[node.args[0]]  # type: ignore[index]
            return source[node.args[1]] if isinstance(source, tuple) else self._data(node)  # type: ignore[index]
        return self._call(node)

    def _input(self, node: fx.Node) -> Value:
        name = self._names.get(str(node.target))
        if name is None:
            return self._data(node)
        tensor = self._module_tensor(name)
        if tensor is None:
            return self._data(node)
        first_name = self._first_name[id(tensor)]
        if node.users:
            self._sources[node] = first_name
        return self._label(first_name, tensor)

    def _module_tensor(self, name: str) -> Tensor | None:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(self._module.get_submodule(owner), leaf, None)
        return tensor if isinstance(tensor, Tensor) and id(tensor) in self._first_name else None

    def _label(self, name: str, tensor: Tensor) -> Labelled:
        """Return the labels of a parameter: one layer a dimension."""
        if name not in self._origins:
            new = self.space.fresh if isinstance(tensor, nn.Parameter) else self.space.fresh_of_buffer
            firsts = [(dim, size, new(size)) for dim, size in enumerate(tensor.shape)]
            self._origins[name] = [
                Origin(name, dim, int(labels[0]) if size else 0, size) for dim, size, labels in firsts
            ]
        nonzero = tensor.detach() != 0
        layers = []
        for origin in self._origins[name]:
            if origin.size > 1:
                shape = [origin.size if dim == origin.dim else 1 for dim in range(tensor.ndim)]
                labels = torch.arange(origin.first, origin.first + origin.size).reshape(shape)
                others = [dim for dim in range(tensor.ndim) if dim != origin.dim]
                used = nonzero.any(others) if others else nonzero
                layers.append(Layer(labels, ~used.cpu().reshape(shape)))
        return Labelled(tuple(tensor.shape), tuple(layers))

    def _data(self, node: fx.Node) -> Value:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return Labelled(sizes_of(value))
        if isinstance(value, (tuple, list)):
            return tuple(Labelled(sizes_of(each) if isinstance(each, Tensor) else ()) for each in value)
        return Labelled(())

    def _output(self, node: fx.Node) -> Value:
        user_outputs = set(self.program.graph_signature.user_outputs)
        for each in node.all_input_nodes:
            for part in parts_of(self.values[each]):
                for layer in part.layers if each.name in user_outputs else ():
                    self.space.fix(layer.labels, "the output")
        return Labelled(())

    def _call(self, node: fx.Node) -> Value:
        if not isinstance(node.target, torch._ops.OpOverload):
            return self._strange(node)
        call = Call(node, self.space, self.values, self._constant)
        if not any(each.layers for each in call.tensors()):
            return call.without_labels()
        rule = rule_for(node, call.name)
        if rule is None:
            self.unknown.setdefault(call.name, place_of(node))
            return call.fix_all(f"`{call.name}`, an operator without a rule")
        return rule(call)

    def _strange(self, node: fx.Node) -> Value:
        """Keep what enters something that is no ATen operator; arithmetic on sizes is none of our concern."""
        for each in node.all_input_nodes:
            for part in parts_of(self.values[each]):
                for layer in part.layers:
                    self.unknown.setdefault(operator_name(node), place_of(node))
                    self.space.fix(layer.labels, f"`{operator_name(node)}`, an operator without a rule")
        return self._data(node)

    def _keep_up(self, node: fx.Node) -> None:
        """Give a tensor that was changed in place what is now known of it."""
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args and isinstance(node.args[0], fx.Node):
            self.values[node.args[0]] = self.values[node]

    def _constant(self, argument: Any) -> Tensor | None:
        """Return the value of a node that depends on buffers alone, if it does."""
        if not isinstance(argument, fx.Node):
            return argument if isinstance(argument, Tensor) else None
        if argument not in self._constants:
            self._constants[argument] = self._evaluated(argument)
        return self._constants[argument]

    def _evaluated(self, node: fx.Node) -> Tensor | None:
        if node.op == "placeholder":
            signature = self.program.graph_signature
            name = signature.inputs_to_buffers.get(str(node.target))
            if name is not None:
                return self._module_tensor(name)
            name = signature.inputs_to_lifted_tensor_constants.get(str(node.target))
            return None if name is None else self.program.constants[name]
        schema = getattr(node.target, "_schema", None)
        if schema is None or schema.is_mutable:
            return None
        known = {each: self._constant(each) for each in node.all_input_nodes}
        if any(each is None for each in known.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: known[each])
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, Tensor) else None
