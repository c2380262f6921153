"""Sizes that are written into a graph, counted anew for the elements that are kept."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking.labels import Labelled
from lightning_structopt.shrinking.operators import (
    Value,
    arguments_of,
    concrete,
    operator_name,
    parts_of,
    place_of,
)
from lightning_structopt.shrinking.tracing import Trace

_SHAPES = {"view": "size", "_unsafe_view": "size", "reshape": "shape", "expand": "size"}


@dataclass(frozen=True)
class Literal:
    """An argument that has another value in the smaller module.

    Args:
        node: The operator.
        argument: The argument's name.
        old: What it was: a number or a list of numbers.
        new: What it must be.
    """

    node: fx.Node
    argument: str
    old: Any
    new: Any

    @property
    def changed(self) -> bool:
        """Whether it must change."""
        return bool(self.old != self.new)

    @property
    def place(self) -> str:
        """The module that ran the operator."""
        return place_of(self.node)


class Sizes:
    """How many elements of each tensor are kept.

    Args:
        values: The labels of each node.
        kept: For each label, whether it is kept.
    """

    def __init__(self, values: Mapping[fx.Node, Value], kept: Tensor) -> None:
        self._values = values
        self._kept = kept

    def along(self, value: Labelled, dim: int) -> Tensor | None:
        """Return which elements along ``dim`` are kept; None if all are."""
        result = None
        for layer in value.along(dim):
            kept = self._kept[layer.labels]
            others = [axis for axis in layer.dims if axis != dim]
            kept = (kept.any(others) if others else kept).reshape(-1)
            result = kept if result is None else result & kept
        return None if result is None or bool(result.all()) else result

    def size(self, value: Labelled, dim: int) -> int:
        """Return how many elements along ``dim`` are kept."""
        kept = self.along(value, dim)
        return value.shape[dim] if kept is None else int(kept.sum())

    def shape(self, value: Labelled) -> tuple[int, ...]:
        """Return the shape of what is kept."""
        return tuple(self.size(value, dim) for dim in range(value.ndim))

    def of(self, argument: Any) -> Labelled:
        """Return the labels of a node that stands for one tensor; of several, the first."""
        value = self._values.get(argument, Labelled(())) if isinstance(argument, fx.Node) else Labelled(())
        return value[0] if isinstance(value, tuple) else value

    def all_of(self, node: fx.Node) -> tuple[Labelled, ...]:
        """Return the labels of all tensors that a node stands for."""
        return parts_of(self._values[node])


def changed_literals(trace: Trace, kept: Tensor) -> list[Literal]:
    """Return the literals that must change where only labels that are ``kept`` remain."""
    return [literal for literal in all_literals(trace, kept) if literal.changed]


def all_literals(trace: Trace, kept: Tensor) -> list[Literal]:
    """Return all literals that stand for sizes, with their values where only labels that are ``kept`` remain."""
    return literals_of(trace, Sizes(trace.values, kept))


def literals_of(trace: Trace, sizes: Sizes) -> list[Literal]:
    """Return all literals that stand for sizes, with their values where tensors have other ``sizes``."""
    return [
        Literal(node, name, old, new)
        for node in trace.program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        for name, old, new in _literals(node, sizes)
    ]


def _literals(node: fx.Node, sizes: Sizes) -> Iterator[tuple[str, Any, Any]]:
    name, arguments = operator_name(node), arguments_of(node)
    result = sizes.all_of(node)[0]
    if name in _SHAPES and _SHAPES[name] in arguments:
        old = list(arguments[_SHAPES[name]])
        yield _SHAPES[name], old, _resized(old, sizes.shape(result)[-len(old) :] if old else ())
    elif name == "unflatten":
        old, dim = list(arguments["sizes"]), arguments["dim"] % sizes.of(arguments["self"]).ndim
        yield "sizes", old, _resized(old, sizes.shape(result)[dim : dim + len(old)])
    elif name in {"split", "unsafe_split"} and isinstance(arguments.get("split_size"), int):
        dim = arguments["dim"] % result.ndim
        yield (
            "split_size",
            arguments["split_size"],
            _at_least_old(arguments["split_size"], result, dim, sizes),
        )
    elif name == "split_with_sizes":
        parts = [sizes.size(part, arguments["dim"] % part.ndim) for part in sizes.all_of(node)]
        yield (
            "split_sizes",
            list(arguments["split_sizes"]),
            _resized(list(arguments["split_sizes"]), tuple(parts)),
        )
    elif name == "slice":
        yield from _ends(arguments, sizes)
    elif name in {"zeros", "full"} and result.layers:
        yield "size", list(arguments["size"]), _resized(list(arguments["size"]), sizes.shape(result))
    elif name == "narrow":
        yield "length", arguments["length"], sizes.size(result, arguments["dim"])
    elif name.startswith("conv"):
        yield "groups", arguments["groups"], _groups(arguments, sizes)
    elif name in {"layer_norm", "rms_norm"}:
        old = list(arguments["normalized_shape"])
        yield "normalized_shape", old, _resized(old, sizes.shape(result)[-len(old) :])
    elif name == "group_norm":
        old, channels = arguments["num_groups"], result.shape[1]
        yield "num_groups", old, old if old == 1 else sizes.size(result, 1) * old // channels


@dataclass(frozen=True)
class Scaled:
    """A size that the graph computes, of which a part is kept.

    Args:
        node: What computes it.
        old: Its value in the trace.
        new: What that must be.
    """

    node: fx.Node
    old: int
    new: int


def _resized(old: list[Any], new: tuple[int, ...]) -> list[Any]:
    """Put new sizes where there are others; -1 stays."""
    return [_new_size(each, size) for each, size in zip(old, new, strict=True)]


def _new_size(old: Any, size: int) -> Any:
    if isinstance(old, fx.Node):
        was = concrete(old.meta["val"])
        return old if was == size else Scaled(old, was, size)
    return old if old == -1 else size


def _at_least_old(old: int, part: Labelled, dim: int, sizes: Sizes) -> int:
    """Return the size of the first part, or ``old`` if there was only a part smaller than that."""
    return old if part.shape[dim] < old else sizes.size(part, dim)


def _ends(arguments: Mapping[str, Any], sizes: Sizes) -> Iterator[tuple[str, Any, Any]]:
    source = sizes.of(arguments["self"])
    dim = arguments["dim"] % max(1, source.ndim)
    kept = sizes.along(source, dim)
    for name in ("start", "end"):
        old = arguments[name]
        if kept is None or not isinstance(old, int) or old >= len(kept) or old <= -len(kept):
            continue
        new = int(kept[:old].sum()) if old >= 0 else -int(kept[old:].sum())
        yield name, old, new


def _groups(arguments: Mapping[str, Any], sizes: Sizes) -> int:
    source = sizes.of(arguments["input"])
    groups = concrete(arguments["groups"])
    # With one channel a group, groups go with their channels; otherwise every group gets smaller.
    return sizes.size(source, 1) if 1 < groups == source.shape[1] else groups
