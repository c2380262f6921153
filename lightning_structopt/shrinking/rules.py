"""Which labels go together in which operator: one small rule each."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking import movement
from lightning_structopt.shrinking.contraction import (
    along,
    attention,
    collapse_all,
    einsum,
    linear,
    matmul,
    matmul_and_add,
    unknown,
)
from lightning_structopt.shrinking.convolutions import convolution
from lightning_structopt.shrinking.labels import Labelled, Layer, merge
from lightning_structopt.shrinking.norms import (
    batch_norm,
    batch_norm_of_many_results,
    group_norm,
    instance_norm,
    layer_norm,
    weight_norm,
)
from lightning_structopt.shrinking.operators import Call, Value, operator_name
from lightning_structopt.shrinking.recurrence import cell, recurrent
from lightning_structopt.shrinking.zeros import ZeroRule, both_zero, either_zero, nowhere

Rule = Callable[[Call], Value]


def elementwise(call: Call) -> Value:
    """Combine tensors element by element, with broadcasting."""
    return merge(call.space, call.tensors(), call.shape, _zero_rule(call.node), call.why)


def _zero_rule(node: fx.Node) -> ZeroRule:
    """Return how zeros of the arguments make zeros of the result."""
    name = operator_name(node)
    tensors = [each for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
    if len(tensors) == 1:
        return both_zero if _keeps_zero(node) else nowhere
    if name == "mul":
        return either_zero
    if name in {"add", "sub", "maximum", "minimum"}:
        return both_zero
    if name == "div":
        return lambda zeros: zeros[0]
    return nowhere


def _keeps_zero(node: fx.Node) -> bool:
    """Tell whether an operator of one tensor gives zero for zero, by trying."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: torch.zeros(1))
    try:
        return bool((node.target(*args, **kwargs) == 0).all())  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return False


def per_channel_slope(call: Call) -> Value:
    """``prelu``: a slope for each channel, or one for all."""
    source, weight = call.tensor("self"), call.tensor("weight")
    return merge(
        call.space, [source, along(weight, source.ndim, 1)], call.shape, lambda zeros: zeros[0], call.why
    )


def pooling(call: Call) -> Value:
    """Combine places of an image: those stay whole."""
    source = call.tensors()[0]
    places = _places(call.name)
    source = collapse_all(call, source, range(source.ndim - places, source.ndim))
    if "max" not in call.name and "avg" not in call.name:
        source = unknown(source)
    return call.results(source.layers)


def _places(name: str) -> int:
    return next((count for count in (1, 2, 3) if f"{count}d" in name), 2)


def sampling(call: Call) -> Value:
    """``grid_sampler``: read an image at places that data tells; channels pass, places stay whole."""
    for layer in call.tensor("grid").layers:
        call.space.fix(layer.labels, call.why)
    source = unknown(call.tensor("input"))
    return Labelled(call.shape, collapse_all(call, source, range(2, source.ndim)).layers)


def reduction(call: Call) -> Value:
    """Combine the elements along some dimensions; where they differ there alone, the result needs them all."""
    if "other" in call.arguments:  # the larger of two tensors
        return elementwise(call)
    source = call.tensor("self")
    dims = call.dims()
    whole = collapse_all(call, unknown(source), dims, normalized=call.name in _AVERAGES)
    if not call.arguments.get("keepdim"):
        rest = [dim for dim in range(source.ndim) if dim not in dims]
        layers = tuple(layer.moved(rest) for layer in whole.layers)
    else:
        layers = whole.layers
    return call.results(layers)


_AVERAGES = {"mean", "var", "std", "linalg_vector_norm", "norm"}


def whole_along(call: Call) -> Value:
    """``softmax``, ``cumsum`` and others that mix the elements along a dimension."""
    return Labelled(call.shape, collapse_all(call, unknown(call.tensor("self")), call.dims()).layers)


def sorting(call: Call) -> Value:
    """``sort``, ``topk`` and others that pick elements along a dimension: of every channel its own."""
    return call.results(collapse_all(call, unknown(call.tensor("self")), call.dims()).layers)


def unfolding(call: Call) -> Value:
    """``im2col``: every channel becomes the places of the kernel, whole; padding is zero and no channel."""
    source, kernel = call.tensor("self"), math.prod(call.plain(call.arguments["kernel_size"]))
    if source.ndim != 4:
        return call.fix_all()
    flat = (layer.reshaped(*layer.labels.shape[:2]) for layer in collapse_all(call, source, [2, 3]).layers)
    layers = (
        Layer(
            *(
                each.repeat_interleave(kernel, 1) if each.shape[1] > 1 else each
                for each in (layer.labels, layer.zero)
            )
        )
        for layer in flat
    )
    return Labelled(call.shape, tuple(layer.reshaped(*layer.labels.shape, 1) for layer in layers))


def folding(call: Call) -> Value:
    """``col2im``: patches of (channels, kernel) are added up; the kernel stays whole."""
    source, kernel = call.tensor("self"), math.prod(call.plain(call.arguments["kernel_size"]))
    if source.ndim != 3:
        return call.fix_all()
    layers = []
    for layer in collapse_all(call, source, [0, 2]).layers:
        patches = layer.reshaped(-1, kernel)
        whole = call.space.collapse(patches, [1], call.why)
        if whole is not None:
            layers.append(whole.reshaped(1, -1, 1, 1))
    return Labelled(call.shape, tuple(layers))


def embedding_bag(call: Call) -> Value:
    """Look up rows and add them up: features go, entries stay."""
    weight = collapse_all(call, call.tensor("weight"), [0])
    if call.given("per_sample_weights"):
        for layer in call.tensor("per_sample_weights").layers:
            call.space.fix(layer.labels, call.why)
    first, *others = (Labelled(shape) for shape in call.shapes)
    return (Labelled(first.shape, tuple(layer.moved([None, 1]) for layer in weight.layers)), *others)


def embedding(call: Call) -> Value:
    """Look up rows: features go, entries stay."""
    weight = collapse_all(call, call.tensor("weight"), [0])
    for layer in call.tensor("indices").layers:
        call.space.fix(layer.labels, call.why)
    added = len(call.shape) - 2
    return Labelled(call.shape, tuple(layer.moved([None] * (added + 1) + [1]) for layer in weight.layers))


def gated(call: Call) -> Value:
    """``glu``: one half times the sigmoid of the other."""
    source, dim = call.tensor("self"), call.dim()
    half = call.shape[dim]
    layers = []
    for layer in source.layers:
        if layer.labels.shape[dim] > 1:
            first, second = layer.labels.narrow(dim, 0, half), layer.labels.narrow(dim, half, half)
            call.space.tie(first, second)
            layers.append(type(layer)(first, layer.zero.narrow(dim, 0, half)))
        else:
            layers.append(layer)
    return Labelled(call.shape, tuple(layers))


def no_zeros(call: Call) -> Value:
    """Keep channels apart, but not their zeros: what drops out is set to another number."""
    return Labelled(call.shape, unknown(call.tensors()[0]).layers)


def no_labels(call: Call) -> Value:
    """Make data of a shape, whatever the elements are."""
    return call.without_labels()


# Element by element, though torch does not tag them so.
_UNTAGGED = (
    *("celu", "elu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid"),
    *("mish", "relu6", "rrelu", "selu", "silu", "softplus", "softshrink", "square", "threshold"),
    *("zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "masked_fill", "where"),
)

# What batch norm becomes within a region of autocast.
_BATCH_NORMS = (
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
)
# Everything that makes images of another size, channel by channel.
_RESIZES = (
    *(f"{kind}{places}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for places in (1, 2, 3)),
    *(f"{kind}_pad{places}d" for kind in ("reflection", "replication") for places in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(movement.MOVES, movement.move),
    **dict.fromkeys(movement.SAME, movement.same),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split"), movement.split),
    "tensor_split": movement.split_whole,
    **dict.fromkeys(("select", "unbind"), movement.take),
    **dict.fromkeys(("cat", "concat", "stack"), movement.concatenate),
    **dict.fromkeys(("pad", "constant_pad_nd"), movement.pad),
    "slice": movement.cut,
    "repeat_interleave": movement.repeat_interleave,
    "index": movement.index,
    "index_select": movement.index_select,
    "gather": movement.gather,
    **dict.fromkeys(("roll", "unfold"), movement.move_whole),
    "channel_shuffle": movement.shuffle,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution),
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), matmul),
    **dict.fromkeys(("addmm", "baddbmm"), matmul_and_add),
    "einsum": einsum,
    "scaled_dot_product_attention": attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
    "batch_norm": batch_norm,
    **dict.fromkeys(_BATCH_NORMS, batch_norm_of_many_results),
    "instance_norm": instance_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "group_norm": group_norm,
    "_weight_norm": weight_norm,
    "embedding": embedding,
    "embedding_bag": embedding_bag,
    "im2col": unfolding,
    "col2im": folding,
    **dict.fromkeys(("sort", "topk", "argsort", "cummax", "cummin", "kthvalue"), sorting),
    "glu": gated,
    **dict.fromkeys(
        [
            f"{kind}_pool{places}d"
            for kind in ("avg", "max", "adaptive_avg", "adaptive_max")
            for places in (1, 2, 3)
        ],
        pooling,
    ),
    **dict.fromkeys([f"max_pool{places}d_with_indices" for places in (1, 2, 3)], pooling),
    **dict.fromkeys(_RESIZES, pooling),
    **dict.fromkeys((*_AVERAGES, "sum", "amax", "amin", "prod", "any", "all", "logsumexp"), reduction),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "var_mean"), reduction),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "cumsum"), whole_along),
    **dict.fromkeys(_UNTAGGED, elementwise),
    "grid_sampler": sampling,
    "prelu": per_channel_slope,
    "native_dropout": movement.same_of_each,
    "alpha_dropout": no_zeros,
    **dict.fromkeys(
        ("new_zeros", "new_ones", "new_full", "new_empty", "sym_size", "_assert_tensor_metadata"), no_labels
    ),  # fmt: skip
}


def rule_for(node: fx.Node, name: str) -> Rule | None:
    """Return the rule of an operator; None if nobody taught it."""
    if name in RULES:
        return RULES[name]
    tags = getattr(node.target, "tags", ())
    return elementwise if torch.Tag.pointwise in tags else None
