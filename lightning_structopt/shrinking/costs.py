"""What a module would cost if only some labels were kept, without making it."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from lightning_structopt.shrinking.contraction import spelled_out
from lightning_structopt.shrinking.labels import Labelled
from lightning_structopt.shrinking.literals import Sizes
from lightning_structopt.shrinking.operators import arguments_of, operator_name
from lightning_structopt.shrinking.tracing import Trace, tensors_of

Cost: TypeAlias = "Callable[[Tensor], float]"
"""Of the labels that are kept (bool, one for each label), what the module costs then."""


def parameter_count(module: nn.Module, traced: Trace) -> Cost:
    """Return what counts the parameters, those that are shared once."""
    return _element_count(dict(module.named_parameters()), dict.fromkeys(tensors_of(module), 1), traced)


def size_count(module: nn.Module, traced: Trace) -> Cost:
    """Return what counts the bytes of parameters and buffers, those that are shared once."""
    tensors = tensors_of(module)
    return _element_count(tensors, {name: each.element_size() for name, each in tensors.items()}, traced)


def _element_count(tensors: Mapping[str, Tensor], weights: Mapping[str, int], traced: Trace) -> Cost:
    origins = [origin for origin in traced.origins if origin.name in tensors]

    def cost(kept: Tensor) -> int:
        running = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        for origin in origins:
            shapes[origin.name][origin.dim] = int(running[origin.first + origin.size] - running[origin.first])
        return sum(weights[name] * torch.Size(shape).numel() for name, shape in shapes.items())

    return cost


def flop_count(traced: Trace) -> "Callable[[Tensor], int]":
    """Return what counts floating-point operations as :mod:`torch.utils.flop_counter` does.

    Two for each multiplication and addition of convolutions, matrix products, attention and recurrent layers,
    for a batch as that of the example input.
    """
    nodes = [node for node in traced.program.graph.nodes if node.op == "call_function" and _counts(node)]

    def cost(kept: Tensor) -> int:
        sizes = Sizes(traced.values, kept)
        return sum(2 * _multiplications(node, sizes) for node in nodes)

    return cost


# By the name of the operator, the argument that is the left matrix.
_MATRIX_PRODUCTS = {"matmul": "self", "mm": "self", "bmm": "self", "addmm": "mat1", "baddbmm": "batch1"}


def _counts(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = operator_name(node)
    return name.startswith("conv") or name in {
        *_MATRIX_PRODUCTS,
        *("linear", "einsum", "scaled_dot_product_attention", "lstm", "gru", "rnn_tanh", "rnn_relu"),
        *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    }


def _multiplications(node: fx.Node, sizes: Sizes) -> int:
    name, arguments = operator_name(node), arguments_of(node)
    result = sizes.shape(sizes.all_of(node)[0])
    if name.startswith("conv"):
        # Each output of a convolution, each input of a transposed one, meets one slice of the weight.
        weight = sizes.shape(sizes.of(arguments["weight"]))
        places = sizes.shape(sizes.of(arguments["input"])) if "transpose" in name else result
        return _product(places) * _product(weight[1:])
    if name == "linear":
        return _product(result) * sizes.shape(sizes.of(arguments["weight"]))[1]
    if name in _MATRIX_PRODUCTS:
        return _product(result) * sizes.shape(sizes.of(arguments[_MATRIX_PRODUCTS[name]]))[-1]
    if name == "scaled_dot_product_attention":
        query, key = (sizes.shape(sizes.of(arguments[each])) for each in ("query", "key"))
        return _product(query) * key[-2] + _product(result) * key[-2]
    if name == "einsum":
        return _product(sizes_of_letters(node, sizes))
    source = sizes.shape(sizes.of(arguments["input"]))
    if name.endswith("_cell"):
        matrices = _matrices([arguments["w_ih"], arguments["w_hh"]], sizes)
        return _product(source[:-1]) * sum(map(_product, matrices))
    return source[0] * source[1] * sum(_product(shape) for shape in _matrices(arguments["params"], sizes))


def sizes_of_letters(node: fx.Node, sizes: Sizes) -> tuple[int, ...]:
    """Return the size of each letter of an einsum."""
    arguments = arguments_of(node)
    ranks = [sizes.of(tensor).ndim for tensor in arguments["tensors"]]
    inputs = spelled_out(arguments["equation"], ranks).partition("->")[0].split(",")
    letters: dict[str, int] = {}
    for names, tensor in zip(inputs, arguments["tensors"], strict=True):
        for letter, size in zip(names, sizes.shape(sizes.of(tensor)), strict=False):
            letters[letter] = max(letters.get(letter, 1), size)
    return tuple(letters.values())


def _matrices(parameters: list[fx.Node], sizes: Sizes) -> Iterator[tuple[int, ...]]:
    for each in parameters:
        value: Labelled = sizes.of(each)
        if value.ndim == 2:
            yield sizes.shape(value)


def _product(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
