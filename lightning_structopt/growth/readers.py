"""Which weights read the channels of a group: where copies of a channel are added up again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking.groups import Slot
from lightning_structopt.shrinking.labels import Labelled
from lightning_structopt.shrinking.operators import arguments_of, concrete, operator_name
from lightning_structopt.shrinking.tracing import Origin, Trace

_Operand = tuple[Any, int]  # an argument, and the dimension along which it is added up
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@dataclass(frozen=True)
class Readers:
    """What an operator adds up over channels.

    Args:
        read: For each parameter and dimension, the indices of channels that it reads.
        multiplied: Likewise for what makes channels, where two activations are multiplied and added up, so that no
            weight reads them.
    """

    read: dict[Slot, set[int]]
    multiplied: dict[Slot, set[int]]


def find_readers(traces: Sequence[tuple[Trace, Tensor]]) -> Readers:
    """Find what reads channels in the graphs of a module.

    Args:
        traces: Graphs with labels, each with the class of every label.
    """
    readers = Readers({}, {})
    for trace, classes in traces:
        fixed = _without_data(trace)
        for node in trace.program.graph.nodes:
            sides = list(_operands(node))
            for number, (argument, dim) in enumerate(sides):
                labels = _varying(trace.values.get(argument), dim, classes)
                weight = argument in fixed
                if weight and number and sides[0][0] in fixed and operator_name(node) not in _RECURRENT:
                    continue  # a product of two weights is divided once
                if weight:
                    _add(readers.read, trace.origins, labels)
                elif not any(other in fixed for other, _ in sides):
                    _add(readers.multiplied, trace.origins, labels)
    return readers


def _without_data(trace: Trace) -> set[fx.Node]:
    """Return the nodes that depend on parameters and buffers alone."""
    inputs = set(trace.program.graph_signature.user_inputs)
    fixed: set[fx.Node] = set()
    for node in trace.program.graph.nodes:
        if node.name not in inputs and all(each in fixed for each in node.all_input_nodes):
            fixed.add(node)
    return fixed


def _operands(node: fx.Node) -> Iterator[_Operand]:
    """Yield what an operator multiplies, each with the dimension along which it adds up."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    name, arguments = operator_name(node), arguments_of(node)
    if name == "linear":
        yield from ((arguments["input"], -1), (arguments["weight"], 1))
    elif name.startswith("conv"):
        yield from _of_convolution(name, arguments)
    elif name in {"matmul", "mm", "bmm"}:
        yield from ((arguments["self"], -1), (arguments.get("other", arguments.get("mat2")), -2))
    elif name in {"addmm", "baddbmm"}:
        one, other = ("mat1", "mat2") if name == "addmm" else ("batch1", "batch2")
        yield from ((arguments[one], -1), (arguments[other], -2))
    elif name == "scaled_dot_product_attention":
        yield from ((arguments["query"], -1), (arguments["key"], -1))
    elif name == "einsum":
        yield from _of_einsum(arguments)
    elif name in _RECURRENT:
        yield from ((each, 1) for each in arguments["params"] if each.meta["val"].ndim == 2)


def _of_convolution(name: str, arguments: dict[str, Any]) -> Iterator[_Operand]:
    transposed = name.startswith("conv_transpose") or bool(arguments.get("transposed"))
    source, weight, groups = arguments["input"], arguments["weight"], concrete(arguments["groups"])
    if source.meta["val"].shape[1] == groups:
        return  # one channel a group: nothing is added up
    yield from ((source, 1), (weight, 0 if transposed else 1))


def _of_einsum(arguments: dict[str, Any]) -> Iterator[_Operand]:
    inputs, _, output = arguments["equation"].replace(" ", "").partition("->")
    for letters, tensor in zip(inputs.split(","), arguments["tensors"], strict=True):
        yield from ((tensor, dim) for dim, letter in enumerate(letters) if letter not in output)


def _varying(value: Any, dim: int, classes: Tensor) -> Tensor:
    """Return the labels of layers of which different members are along ``dim``."""
    found = [torch.empty(0, dtype=torch.int64)]
    if isinstance(value, Labelled) and value.shape:
        for layer in value.along(dim % value.ndim):
            own = classes[layer.labels]
            if bool((own != own.narrow(dim, 0, 1)).any()):
                found.append(layer.labels.reshape(-1))
    return torch.unique(torch.cat(found))  # type: ignore[no-any-return]


def _add(found: dict[Slot, set[int]], origins: Sequence[Origin], labels: Tensor) -> None:
    for origin in origins if labels.numel() else ():
        own = labels[(labels >= origin.first) & (labels < origin.first + origin.size)] - origin.first
        if own.numel():
            found.setdefault((origin.name, origin.dim), set()).update(own.tolist())
