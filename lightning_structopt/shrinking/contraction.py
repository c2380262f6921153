"""Operators that multiply and add up: what is contracted with each other goes together."""

import string
from collections.abc import Iterable, Sequence

import torch

from lightning_structopt.shrinking.labels import Labelled, LabelSpace, Layer, merge
from lightning_structopt.shrinking.operators import Call, Value
from lightning_structopt.shrinking.zeros import both_zero, either_zero


def contract(space: LabelSpace, left: Labelled, right: Labelled, equation: str, why: str) -> Labelled:
    """Return the labels of ``torch.einsum(equation, left, right)``.

    Where labels differ along a batch and a contracted dimension (heads and their features), the batch is what
    can go.

    Args:
        space: All labels.
        left: A tensor.
        right: Another.
        equation: ``"nc,oc->no"``: one letter a dimension.
        why: What the user is told of labels that are kept.
    """
    inputs, output = equation.split("->")
    one, other = inputs.split(",")
    letters = output + "".join(sorted(set(one + other) - set(output)))
    axes = set(range(len(output), len(letters)))
    batch = {letters.index(letter) for letter in set(one) & set(other) & set(output)}
    spread = [
        _batches_only(space, _spread(value, own, letters), axes, batch, why)
        for value, own in ((left, one), (right, other))
    ]
    kept = _contracted(space, spread, axes, why)
    shape = tuple(max(value.shape[axis] for value in spread) for axis in range(len(letters)))
    merged = merge(space, kept, shape, either_zero, why)
    tail = len(output)
    return Labelled(
        shape[:tail], tuple(layer.reshaped(*layer.labels.shape[:tail]) for layer in merged.layers)
    )


def _spread(value: Labelled, own: str, letters: str) -> Labelled:
    axes = [own.index(letter) if letter in own else None for letter in letters]
    shape = tuple(1 if axis is None else value.shape[axis] for axis in axes)
    return Labelled(shape, tuple(layer.moved(axes) for layer in value.layers))


def _batches_only(space: LabelSpace, value: Labelled, axes: set[int], batch: set[int], why: str) -> Labelled:
    layers = (
        space.collapse(layer, axes, why) if set(layer.dims) & batch else layer for layer in value.layers
    )
    return Labelled(value.shape, tuple(layer for layer in layers if layer is not None))


def _contracted(space: LabelSpace, values: list[Labelled], axes: set[int], why: str) -> list[Labelled]:
    """End the layers that vary along contracted dimensions, and return what is left."""
    left, right = values
    ended = [[layer for layer in value.layers if set(layer.dims) & axes] for value in values]
    rest = [[layer for layer in value.layers if not set(layer.dims) & axes] for value in values]
    for side, layers in enumerate(ended):
        for layer in layers:
            partners = [each for each in ended[1 - side] if set(each.dims) & set(layer.dims) & axes]
            for partner in partners if side == 0 else ():
                space.tie(layer.labels, partner.labels)
                dead = layer.zero | partner.zero
                space.consume(layer.labels, dead)
                space.consume(partner.labels, dead)
            if not partners:  # data on the other side
                whole = space.collapse(layer, axes, why)
                rest[side].extend([] if whole is None else [whole])
    return [Labelled(value.shape, tuple(layers)) for value, layers in zip((left, right), rest, strict=True)]


def collapse_all(call: Call, value: Labelled, dims: Iterable[int], normalized: bool = False) -> Labelled:
    """Make all layers constant along ``dims``."""
    over = list(dims)
    layers = (call.space.collapse(layer, over, call.why, normalized) for layer in value.layers)
    return Labelled(value.shape, tuple(layer for layer in layers if layer is not None))


def linear(call: Call) -> Value:
    """Multiply by a weight of shape (outputs, inputs)."""
    source, weight = call.tensor("input"), call.tensor("weight")
    rows = "abdefghij"[: source.ndim - 1]
    result = contract(call.space, source, weight, f"{rows}c,oc->{rows}o", call.why)
    return add_bias(call, result, len(call.shape) - 1)


def add_bias(call: Call, result: Labelled, dim: int) -> Labelled:
    """Add the bias, if there is one, along ``dim``."""
    if not call.given("bias"):
        return result
    placed = along(call.tensor("bias"), result.ndim, dim)
    return merge(call.space, [result, placed], result.shape, both_zero, call.why)


def along(vector: Labelled, ndim: int, dim: int) -> Labelled:
    """Return a vector as a tensor of ``ndim`` dimensions that extends along ``dim`` alone."""

    def shape(size: int) -> list[int]:
        return [size if axis == dim else 1 for axis in range(ndim)]

    layers = (layer.reshaped(*shape(layer.labels.numel())) for layer in vector.layers)
    return Labelled(tuple(shape(vector.shape[0] if vector.shape else 1)), tuple(layers))


def matmul(call: Call) -> Value:
    """Multiply matrices, with batches, and vectors."""
    names = [name for name in ("self", "other", "mat2", "vec", "tensor") if name in call.arguments]
    left, right = (call.tensor(name) for name in names)
    row, column = "m" * (left.ndim > 1), "n" * (right.ndim > 1)
    batch = "abdefghij"[: len(call.shape) - len(row + column)]
    one, other = (batch[len(batch) - max(each.ndim - 2, 0) :] for each in (left, right))
    return contract(call.space, left, right, f"{one}{row}k,{other}k{column}->{batch}{row}{column}", call.why)


def matmul_and_add(call: Call) -> Value:
    """``addmm`` and ``baddbmm``: a product of matrices and what is added to it."""
    batch = "b" if call.name == "baddbmm" else ""
    names = ("batch1", "batch2") if batch else ("mat1", "mat2")
    left, right = (call.tensor(name) for name in names)
    result = contract(call.space, left, right, f"{batch}mk,{batch}kn->{batch}mn", call.why)
    return merge(call.space, [result, call.tensor("self")], call.shape, both_zero, call.why)


def einsum(call: Call) -> Value:
    """``torch.einsum`` of two tensors."""
    tensors = [call.of(each) for each in call.arguments["tensors"]]
    ranks = [each.ndim for each in tensors if isinstance(each, Labelled)]
    equation = spelled_out(call.arguments["equation"], ranks)
    if len(tensors) != 2 or "->" not in equation or _repeats(equation):
        return call.fix_all()
    left, right = tensors
    assert isinstance(left, Labelled)
    assert isinstance(right, Labelled)
    return contract(call.space, left, right, equation, call.why)


def spelled_out(equation: str, ranks: Sequence[int]) -> str:
    """Return the equation of an einsum with letters in the place of its ellipsis.

    Args:
        equation: As the user wrote it.
        ranks: The number of dimensions of each tensor.

    Example:
        >>> spelled_out("...c, co -> ...o", [3, 2])
        'ABc,co->ABo'
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    hidden = [
        rank - len(part.replace("...", "")) if "..." in part else 0
        for part, rank in zip(parts, ranks, strict=True)
    ]
    letters = [each for each in string.ascii_uppercase if each not in equation][: max(hidden, default=0)]
    spelled = (
        part.replace("...", "".join(letters[len(letters) - count :]))
        for part, count in zip(parts, hidden, strict=True)
    )
    return ",".join(spelled) + arrow + output.replace("...", "".join(letters))


def _repeats(equation: str) -> bool:
    """Tell whether a tensor has the same letter twice, which is a diagonal."""
    return any(len(set(part)) < len(part) for part in equation.partition("->")[0].split(","))


def attention(call: Call) -> Value:
    """Scaled dot-product attention: whole heads can go."""
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    if query.ndim < 3:
        return call.fix_all()
    if call.arguments.get("enable_gqa"):
        heads = query.ndim - 3
        key, value = (_repeated(each, heads, query.shape[heads]) for each in (key, value))
    batch = "abdefghij"[: query.ndim - 2]
    if call.arguments.get("scale") is None:  # which is then computed from the number of features
        query, key = (_whole_features(call, each) for each in (query, key))
    scores = contract(call.space, query, key, f"{batch}tk,{batch}sk->{batch}ts", call.why)
    if call.given("attn_mask"):
        mask = call.tensor("attn_mask")
        scores = merge(call.space, [scores, mask], scores.shape, both_zero, call.why)
    # Equal scores of zero still attend.
    scores = collapse_all(call, unknown(scores), [scores.ndim - 1])
    return contract(call.space, scores, value, f"{batch}ts,{batch}sv->{batch}tv", call.why)


def unknown(value: Labelled) -> Labelled:
    """Return ``value`` as if nothing of it were known to be zero."""
    return Labelled(
        value.shape, tuple(Layer(layer.labels, torch.zeros_like(layer.zero)) for layer in value.layers)
    )


def _whole_features(call: Call, value: Labelled) -> Labelled:
    return collapse_all(call, value, [value.ndim - 1])


def _repeated(value: Labelled, dim: int, heads: int) -> Labelled:
    times = heads // value.shape[dim]
    layers = tuple(
        Layer(layer.labels.repeat_interleave(times, dim), layer.zero.repeat_interleave(times, dim))
        if layer.labels.shape[dim] > 1
        else layer
        for layer in value.layers
    )
    return Labelled(value.shape[:dim] + (heads,) + value.shape[dim + 1 :], layers)
