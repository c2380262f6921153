"""The exported graph as a smaller module, for sizes that are written into code."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

from lightning_structopt.shrinking.exporting import export
from lightning_structopt.shrinking.literals import Literal, Scaled, changed_literals
from lightning_structopt.shrinking.operators import arguments_of
from lightning_structopt.shrinking.surgery import smaller_copy
from lightning_structopt.shrinking.tracing import Trace, walk

Kept = Mapping[str, Mapping[int, list[int]]]


class GraphForm(nn.Module):
    """A module that runs exported graphs: one in evaluation, one in training.

    Parameters and buffers have the names that they have in the module it was made of, so that state dicts
    and optimizers fit.

    Args:
        module: Has the parameters and buffers; its ``forward`` is not used.
        programs: The graphs for evaluation and for training.
    """

    def __init__(self, module: nn.Module, programs: Mapping[bool, torch.export.ExportedProgram]) -> None:
        super().__init__()
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._modules = module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training
        self._runs = {training: _Run(program) for training, program in programs.items()}

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._runs[self.training](self, args, kwargs)


class _Run:
    """One exported graph, to be run with the tensors that a module has."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        signature = program.graph_signature
        self._code = fx.GraphModule(nn.Module(), program.graph)
        self._inputs = [(spec.kind, spec.target) for spec in signature.input_specs]
        self._outputs = [(spec.kind, spec.target) for spec in signature.output_specs]
        self._constants = dict(program.constants)
        self._in_spec, self._out_spec = program.call_spec.in_spec, program.call_spec.out_spec

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        if spec != self._in_spec:
            raise ValueError(
                "A module that is an exported graph takes inputs as the example input was. Found "
                f"{len(flat)} values as {spec}. Give them the same way, by position."
            )
        given = iter(flat)
        inputs = [
            next(given) if kind == InputKind.USER_INPUT else self._tensor(module, kind, str(target))
            for kind, target in self._inputs
        ]
        outputs = self._code(*inputs)
        wanted = []
        for (kind, target), output in zip(self._outputs, outputs, strict=True):
            if kind == OutputKind.USER_OUTPUT:
                wanted.append(output)
            elif kind == OutputKind.BUFFER_MUTATION:
                module.get_buffer(str(target)).copy_(output)
        return tree_unflatten(wanted, self._out_spec)

    def _tensor(self, module: nn.Module, kind: InputKind, target: str) -> Any:
        # Buffers that are not saved are among the constants too, as large as they were.
        if kind not in {InputKind.PARAMETER, InputKind.BUFFER}:
            return self._constants[target]
        owner, _, leaf = target.rpartition(".")
        return getattr(module.get_submodule(owner), leaf)


def smaller_graph(module: nn.Module, inputs: tuple[Any, ...], kept: Kept) -> GraphForm:
    """Return the module's graph with smaller parameters and the sizes in it counted anew.

    Args:
        module: The whole module; left as it is.
        inputs: The arguments of its ``forward``. Where their first dimensions are a batch that the graph can
            leave open, it takes batches of other sizes too.
        kept: For each parameter and buffer, the indices that are kept along each dimension.
    """
    programs = {training: _smaller_program(module, inputs, kept, training) for training in (False, True)}
    return GraphForm(smaller_copy(module, kept), programs)


def _smaller_program(
    module: nn.Module, inputs: tuple[Any, ...], kept: Kept, training: bool
) -> torch.export.ExportedProgram:
    try:
        traced = walk(module, export(module, inputs, training, dynamic=_open_batch(inputs)))
    except ValueError:  # code that asks for the size of its batch
        traced = walk(module, export(module, inputs, training))
    for literal in changed_literals(traced, kept_labels(traced, kept)):
        _rewrite(literal)
    return traced.program


def _open_batch(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    auto = torch.export.Dim.AUTO
    return tuple({0: auto} if isinstance(each, Tensor) and each.ndim else None for each in inputs)


def kept_labels(traced: Trace, kept: Kept) -> Tensor:
    """Return for each label of a trace whether it is kept."""
    result = torch.ones(traced.space.size, dtype=torch.bool)
    for origin in traced.origins:
        indices = kept.get(origin.name, {}).get(origin.dim)
        if indices is not None:
            result[origin.first : origin.first + origin.size] = False
            result[origin.first + torch.tensor(indices)] = True
    return result


def _rewrite(literal: Literal) -> None:
    node = literal.node
    new = literal.new
    if isinstance(new, list):
        new = [_computed(node, each) if isinstance(each, Scaled) else each for each in new]
    arguments: dict[str, Any] = arguments_of(node) | {literal.argument: new}
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    node.args = tuple(arguments[each.name] for each in schema if not each.kwarg_only)
    node.kwargs = {each.name: arguments[each.name] for each in schema if each.kwarg_only}


def _computed(before: fx.Node, size: Scaled) -> fx.Node:
    """Return a node that computes the kept part of a size, whatever the batch."""
    graph = before.graph
    with graph.inserting_before(before):
        product = graph.call_function(operator.mul, (size.node, size.new))
        return graph.call_function(operator.floordiv, (product, size.old))
