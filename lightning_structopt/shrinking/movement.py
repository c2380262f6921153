"""Operators that only move elements: the same operator moves the labels."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_structopt.shrinking.contraction import collapse_all
from lightning_structopt.shrinking.labels import Labelled, Layer, compact, merge
from lightning_structopt.shrinking.operators import Call, Value
from lightning_structopt.shrinking.zeros import both_zero

# These run on labels as they are, in full size (which `expand` makes cheap).
MOVES = {
    "_unsafe_view",
    "diagonal",
    "expand",
    "expand_as",
    "flatten",
    "flip",
    "movedim",
    "narrow",
    "permute",
    "pixel_shuffle",
    "pixel_unshuffle",
    "repeat",
    "reshape",
    "reshape_as",
    "squeeze",
    "swapaxes",
    "t",
    "tile",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
}
# These change a tensor's type or nothing at all.
SAME = {"_to_copy", "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "identity",
        "lift_fresh_copy", "to", "type_as"}  # fmt: skip


def same(call: Call) -> Value:
    """Pass labels through."""
    return Labelled(call.shape, call.tensors()[0].layers)


def same_of_each(call: Call) -> Value:
    """Pass labels through to each of several results."""
    return call.results(call.tensors()[0].layers)


def move(call: Call) -> Value:
    """Run the operator itself on the labels."""
    source = call.tensor("self")
    if call.name in {"reshape_as", "view_as"}:
        return Labelled(call.shape, _moved(source, lambda full: full.reshape(call.shape)))
    if call.name == "expand_as":
        return Labelled(call.shape, _moved(source, lambda full: full.expand(call.shape)))
    if call.name in {"view", "_unsafe_view"}:  # of a copy where strides allow no view: labels are expanded
        if "size" not in call.arguments:
            return call.fix_all()  # which looks at bytes as another type
        return Labelled(call.shape, _moved(source, lambda full: full.reshape(call.shape)))
    return Labelled(call.shape, _moved(source, _itself(call)))


def _itself(call: Call) -> Callable[[Tensor], Tensor]:
    """Return the operator as a function of its first argument."""
    rest = {name: call.plain(value) for name, value in call.arguments.items() if name != "self"}
    target: Callable[..., Tensor] = call.node.target  # type: ignore[assignment]
    return lambda full: target(full, **rest)


def _moved(source: Labelled, operator: Callable[[Tensor], Tensor]) -> tuple[Layer, ...]:
    layers = (run_on(layer, source.shape, operator) for layer in source.layers)
    return tuple(layer for layer in layers if layer is not None)


def run_on(layer: Layer, shape: tuple[int, ...], operator: Callable[[Tensor], Tensor]) -> Layer | None:
    """Run an operator that moves elements on a layer of a tensor of ``shape``."""
    codes = operator((layer.labels * 2 + layer.zero).expand(shape))
    for dim in range(codes.ndim):  # before they are taken apart, as that writes out what is expanded
        if codes.shape[dim] > 1 and codes.stride(dim) == 0:
            codes = codes.narrow(dim, 0, 1)
    return compact(codes // 2, codes % 2 == 1)


def move_whole(call: Call) -> Value:
    """``roll`` and ``unfold``: distances are counted in elements, so that along these dimensions all stay."""
    dims = call.dims("dims") if call.name == "roll" else [call.dim("dimension")]
    whole = collapse_all(call, call.tensor("self"), dims)
    return Labelled(call.shape, _moved(whole, _itself(call)))


def shuffle(call: Call) -> Value:
    """``channel_shuffle``: the same channels of every group go."""
    source = call.tensor("self")
    alike = _alike(call, source, 1, source.shape[1] // call.plain(call.arguments["groups"]))
    return Labelled(call.shape, _moved(alike, _itself(call)))


def split(call: Call) -> Value:
    """Cut along a dimension; parts of equal size that code counts must stay equal."""
    source, dim = call.tensor("self"), call.dim()
    if call.name != "split_with_sizes":
        source = _alike(call, source, dim, call.shape[dim])
    starts = [0]
    for shape in call.shapes:
        starts.append(starts[-1] + shape[dim])
    parts = (
        Labelled(shape, _moved(source, partial(torch.narrow, dim=dim, start=start, length=shape[dim])))
        for start, shape in zip(starts, call.shapes, strict=False)
    )
    return tuple(_not_alone(call, source, part, dim) for part in parts)


def split_whole(call: Call) -> Value:
    """``tensor_split``: cut along a dimension that stays whole."""
    return call.results(collapse_all(call, call.tensor("self"), [call.dim()]).layers)


def _alike(call: Call, source: Labelled, dim: int, size: int) -> Labelled:
    """Tie the parts of ``size`` along ``dim`` to the first one; keep all where the last part is smaller."""
    layers = []
    for layer in source.layers:
        if layer.labels.shape[dim] == 1:
            layers.append(layer)
        elif source.shape[dim] % size:
            call.space.fix(layer.labels, call.why)
        else:
            parts = layer.labels.unflatten(dim, (-1, size))  # type: ignore[no-untyped-call]
            call.space.tie(parts, parts.narrow(dim, 0, 1))
            layers.append(layer)
    return Labelled(source.shape, tuple(layers))


def take(call: Call) -> Value:
    """``select`` and ``unbind``: all slices must stay, so each must keep the same."""
    source, dim = call.tensor("self"), call.dim()
    rest = [axis for axis in range(source.ndim) if axis != dim]
    moved = tuple(layer.moved(rest) for layer in collapse_all(call, source, [dim]).layers)
    if call.name == "unbind":
        return tuple(Labelled(shape, moved) for shape in call.shapes)
    return Labelled(call.shape, moved)


def cut(call: Call) -> Value:
    """``slice``: ends are counted anew, so a step is not possible where labels differ."""
    source, dim = call.tensor("self"), call.dim()
    if call.plain(call.arguments["step"]) != 1:
        source = collapse_all(call, source, [dim])
    result = Labelled(call.shape, _moved(source, _itself(call)))
    return _not_alone(call, source, result, dim)


def _not_alone(call: Call, source: Labelled, part: Labelled, dim: int) -> Labelled:
    """Keep what code cuts out as a single element: without it the part would be empty."""
    if part.shape[dim] != 1 or not source.along(dim):
        return part
    for layer in part.layers:
        if not layer.dims:
            call.space.fix(layer.labels, call.why)
    return Labelled(part.shape, tuple(layer for layer in part.layers if layer.dims))


def concatenate(call: Call) -> Value:
    """``cat`` and ``stack``: labels one after the other, and tied across."""
    parts = [each for each in map(call.of, call.arguments["tensors"]) if isinstance(each, Labelled)]
    dim = call.dim(ndim=len(call.shape))
    if call.name == "stack":
        parts = [_unsqueezed(part, dim) for part in parts]
    else:
        parts = [part for part in parts if part.shape != (0,)]  # which `cat` allows for old times' sake
    crossing = _joined(call, parts, dim)
    others = [
        Labelled(
            part.shape[:dim] + (1,) + part.shape[dim + 1 :],
            tuple(layer for layer in part.layers if layer.labels.shape[dim] == 1),
        )
        for part in parts
    ]
    across = merge(call.space, others, call.shape, both_zero, call.why)
    return Labelled(call.shape, crossing + across.layers)


def _unsqueezed(part: Labelled, dim: int) -> Labelled:
    axes = [*range(dim), None, *range(dim, part.ndim)]
    return Labelled(
        part.shape[:dim] + (1,) + part.shape[dim:], tuple(layer.moved(axes) for layer in part.layers)
    )


def _joined(call: Call, parts: list[Labelled], dim: int) -> tuple[Layer, ...]:
    """Return the layer that runs through all parts along ``dim``, if any part has one."""
    if not any(part.along(dim) for part in parts):
        return ()
    labels, zero = [], []
    for part in parts:
        first, *rest = part.along(dim) or (None,)
        for layer in rest:
            assert layer is not None
            call.space.fix(layer.labels, call.why)
        shape = part.shape
        labels.append(torch.zeros((1,) * len(shape), dtype=torch.int64) if first is None else first.labels)
        zero.append(torch.zeros((1,) * len(shape), dtype=torch.bool) if first is None else first.zero)
    widths = [
        max(each.shape[axis] for each in labels) if axis != dim else -1 for axis in range(labels[0].ndim)
    ]
    sized = [[*widths[:dim], part.shape[dim], *widths[dim + 1 :]] for part in parts]
    joined = compact(
        torch.cat([each.expand(size) for each, size in zip(labels, sized, strict=True)], dim),
        torch.cat([each.expand(size) for each, size in zip(zero, sized, strict=True)], dim),
    )
    return () if joined is None else (joined,)


def repeat_interleave(call: Call) -> Value:
    """Repeat each element a fixed number of times."""
    repeats = call.arguments.get("repeats")
    if not isinstance(repeats, int) or call.arguments.get("dim") is None:
        return call.fix_all()
    return move(call)


def pad(call: Call) -> Value:
    """Pad with a constant: dimensions with labels get fixed ones, the others stay as they are."""
    source = call.tensor("self")
    widths = call.plain(call.arguments["pad"])
    inner = {source.ndim - 1 - at // 2: (widths[at], widths[at + 1]) for at in range(0, len(widths), 2)}
    zeros = not call.arguments.get("value") and call.arguments.get("mode", "constant") == "constant"
    layers = []
    for layer in source.layers:
        touched = {dim: ends for dim, ends in inner.items() if layer.labels.shape[dim] > 1 and ends != (0, 0)}
        if touched and (not zeros or any(end < 0 for ends in touched.values() for end in ends)):
            call.space.fix(layer.labels, call.why)
            continue
        labels, zero = layer.labels, layer.zero
        for dim, (before, after) in touched.items():
            amounts = [0, 0] * (source.ndim - 1 - dim) + [before, after]
            labels = torch.nn.functional.pad(labels, amounts)
            zero = torch.nn.functional.pad(zero, amounts)
        layers.append(Layer(labels, zero if zeros else torch.zeros_like(zero)))
    return Labelled(call.shape, tuple(layers))


def index(call: Call) -> Value:
    """Advanced indexing: the indexed dimensions stay whole, also where no index points, as nobody counts anew."""
    where: list[Any] = list(call.arguments["indices"])
    for each in where:
        _fix(call, each)
    if any(each is not None and each.meta["val"].dtype in {torch.bool, torch.uint8} for each in where):
        return call.fix_all()  # by a mask: how many it picks depends on data
    whole = collapse_all(
        call, call.tensor("self"), [dim for dim, each in enumerate(where) if each is not None]
    )
    first = torch.zeros(_indexed(call), dtype=torch.int64)
    picks = tuple(slice(None) if each is None else first for each in where)
    return Labelled(call.shape, _moved(whole, lambda full: full[picks]))


def index_select(call: Call) -> Value:
    """Pick along a dimension, which stays whole."""
    _fix(call, call.arguments["index"])
    whole = collapse_all(call, call.tensor("self"), [call.dim()])
    return Labelled(call.shape, whole.layers)


def gather(call: Call) -> Value:
    """Pick along a dimension, which stays whole, for each element along the others: these go with their index."""
    dim = call.dim()
    source, where = (collapse_all(call, call.tensor(name), [dim]) for name in ("self", "index"))
    if source.shape[:dim] + source.shape[dim + 1 :] != where.shape[:dim] + where.shape[dim + 1 :]:
        return call.fix_all()  # only the first elements along another dimension are read
    one = Labelled(source.shape[:dim] + (1,) + source.shape[dim + 1 :], source.layers)
    return merge(call.space, [one, where], call.shape, lambda zeros: zeros[0], call.why)


def _indexed(call: Call) -> tuple[int, ...]:
    """Return the shape that the indices broadcast to."""
    given = [call.of(each) for each in call.arguments["indices"] if each is not None]
    shapes = [each.shape for each in given if isinstance(each, Labelled)]
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _fix(call: Call, argument: Any) -> None:
    value = call.of(argument)
    for layer in value.layers if isinstance(value, Labelled) else ():
        call.space.fix(layer.labels, call.why)
