"""Normalizations: scale, shift and statistics go with the dimension that they belong to."""

from collections.abc import Sequence

from torch import Tensor

from lightning_structopt.shrinking.contraction import along, collapse_all, unknown
from lightning_structopt.shrinking.labels import Labelled, merge
from lightning_structopt.shrinking.operators import Call, Value
from lightning_structopt.shrinking.zeros import both_zero, either_zero, nowhere


def batch_norm(call: Call) -> Value:
    """Normalize each channel by itself: over the batch and all places."""
    source = call.tensor("input" if "input" in call.arguments else "self")
    source = collapse_all(call, source, [dim for dim in range(source.ndim) if dim != 1])
    names = ("weight", "bias", "running_mean", "running_var")
    vectors = {name: along(call.tensor(name), source.ndim, 1) for name in names if call.given(name)}
    return _per_element(call, source, vectors)


def batch_norm_of_many_results(call: Call) -> Value:
    """Normalize each channel by itself, and return statistics, which have the channels too."""
    result = batch_norm(call)
    assert isinstance(result, Labelled)
    channels = tuple(layer.reshaped(layer.labels.numel()) for layer in unknown(result).along(1))
    statistics = (
        Labelled(shape, channels if shape == result.shape[1:2] else ()) for shape in call.shapes[1:]
    )
    return (result, *statistics)


def _per_element(call: Call, source: Labelled, vectors: dict[str, Labelled]) -> Labelled:
    """Combine channels with what belongs to each."""
    order = list(vectors)

    def zero_of(zeros: Sequence[Tensor | None]) -> Tensor | None:
        # scale * (x - mean) / deviation + shift, which is zero with the scale and the shift, or with all but
        # the scale.
        known = dict(zip(["source", *order], zeros, strict=True))
        shift = known.get("bias")
        if "bias" in vectors and shift is None:
            return None
        centred = both_zero([
            known["source"],
            *([known["running_mean"]] if "running_mean" in vectors else []),
        ])
        result = either_zero([known.get("weight"), centred])
        return result if shift is None else both_zero([result, shift])

    return merge(call.space, [source, *vectors.values()], call.shape, zero_of, call.why)


def layer_norm(call: Call) -> Value:
    """Normalize over the last dimensions (layer norm, RMS norm): without some of them the result differs."""
    source = call.tensor("input")
    inner = len(call.plain(call.arguments["normalized_shape"]))
    dims = list(range(source.ndim - inner, source.ndim))
    vectors = [call.tensor(name) for name in ("weight", "bias") if call.given(name)]
    layers = []
    for layer in source.layers:
        over = [dim for dim in layer.dims if dim in dims]
        if len(over) < len(layer.dims):
            kept = call.space.collapse(layer, dims, call.why)
            layers.extend([] if kept is None else [kept])
            continue
        call.space.mark_normalized(layer.labels)
        layers.append(layer)
    result = merge(
        call.space, [Labelled(source.shape, tuple(layers)), *vectors], call.shape, nowhere, call.why
    )
    return unknown(result)


def group_norm(call: Call) -> Value:
    """Normalize groups of channels: whole groups go; of a single group, any channel, as in layer norm."""
    source = call.tensor("input" if "input" in call.arguments else "self")
    source = collapse_all(call, source, [dim for dim in range(source.ndim) if dim != 1])
    groups = call.plain(call.arguments["num_groups"])
    for layer in source.along(1):
        if groups == 1:
            call.space.mark_normalized(layer.labels)
        else:
            members = layer.labels.reshape(groups, -1)
            call.space.tie(members, members[:, :1])
    names = [name for name in ("weight", "bias") if call.given(name)]
    vectors = [along(call.tensor(name), source.ndim, 1) for name in names]
    return merge(call.space, [source, *vectors], call.shape, nowhere, call.why)


def weight_norm(call: Call) -> Value:
    """A weight as its direction and its length: whatever is removed of the direction was zero."""
    direction, length = call.tensor("v"), call.tensor("g")
    for layer in direction.layers:
        if any(length.shape[dim] > 1 for dim in layer.dims):
            call.space.directions.append(layer.labels.reshape(-1))
    return merge(call.space, [direction, length], call.shape, either_zero, call.why)


def instance_norm(call: Call) -> Value:
    """Normalize each channel of each sample by itself."""
    return batch_norm(call)
