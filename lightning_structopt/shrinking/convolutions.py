"""Convolutions, whole, grouped, depthwise and transposed."""

from lightning_structopt.shrinking.contraction import add_bias, collapse_all, contract
from lightning_structopt.shrinking.labels import Labelled, Layer, merge
from lightning_structopt.shrinking.operators import Call, Value
from lightning_structopt.shrinking.zeros import either_zero


def convolution(call: Call) -> Value:
    """``conv1d`` to ``conv3d`` and their transposes; kernels and places stay whole."""
    source, weight = call.tensor("input"), call.tensor("weight")
    if source.ndim != len(weight.shape):
        return call.fix_all()  # an input without a batch dimension
    spatial = range(2, source.ndim)
    source, weight = (_flat(collapse_all(call, each, spatial)) for each in (source, weight))
    groups = call.plain(call.arguments["groups"])
    transposed = call.name.startswith("conv_transpose") or bool(call.arguments.get("transposed"))
    if groups == 1:
        result = contract(call.space, source, weight, "nc,co->no" if transposed else "nc,oc->no", call.why)
    else:
        source = collapse_all(call, source, [0])
        result = (_grouped_transposed if transposed else _grouped)(call, source, weight, groups)
    whole = tuple(layer.reshaped(*layer.labels.shape, *[1] * len(spatial)) for layer in result.layers)
    return add_bias(call, Labelled(call.shape, whole), 1)


def _flat(value: Labelled) -> Labelled:
    return Labelled(value.shape[:2], tuple(layer.reshaped(*layer.labels.shape[:2]) for layer in value.layers))


def _grouped(call: Call, source: Labelled, weight: Labelled, groups: int) -> Labelled:
    """Weight (outputs, inputs of a group)."""
    rows = _only(call, weight, 0)
    inside = weight.shape[1]
    if inside == 1:  # one input a group: groups come and go with their inputs
        return _depthwise(call, source, rows, groups)
    _inside_groups(call, source, _only(call, weight, 1), groups)
    if rows is not None:
        parts = rows.labels.reshape(groups, -1)
        call.space.tie(parts, parts[:1])
    return Labelled((source.shape[0], weight.shape[0]), _as_channels(rows))


def _depthwise(call: Call, source: Labelled, rows: Layer | None, groups: int) -> Labelled:
    channels = source.shape[1]
    per_group = [layer.reshaped(channels, 1) for layer in source.along(1)]
    outputs = rows.labels.numel() if rows is not None else channels
    one = Labelled((channels, 1), tuple(per_group))
    other = Labelled((channels, outputs // channels))
    if rows is not None:
        other = Labelled(other.shape, (rows.reshaped(*other.shape),))
    merged = merge(call.space, [one, other], other.shape, either_zero, call.why)
    layers = tuple(
        Layer(layer.labels.expand(other.shape).reshape(1, -1), layer.zero.expand(other.shape).reshape(1, -1))
        for layer in merged.layers
    )
    return Labelled((source.shape[0], outputs), layers)


def _inside_groups(call: Call, source: Labelled, columns: Layer | None, groups: int) -> None:
    """Let the same inputs go in every group."""
    along = source.along(1)
    if not along or columns is None:
        for layer in [*along, *([] if columns is None else [columns])]:
            call.space.fix(layer.labels, call.why)
        return
    ends = columns.reshaped(1, -1)
    for layer in along:
        grouped = layer.reshaped(groups, -1)
        call.space.tie(grouped.labels, ends.labels)
        dead = grouped.zero | ends.zero
        call.space.consume(grouped.labels, dead)
        call.space.consume(ends.labels, dead.all(0, keepdim=True))


def _grouped_transposed(call: Call, source: Labelled, weight: Labelled, groups: int) -> Labelled:
    """Weight (inputs, outputs of a group); the same inputs and the same outputs of every group go."""
    rows, columns = _only(call, weight, 0), _only(call, weight, 1)
    if weight.shape[0] == groups and weight.shape[1] == 1:
        return _depthwise(call, source, rows, groups)
    if rows is not None:
        grouped = rows.labels.reshape(groups, -1)
        call.space.tie(grouped, grouped[:1])
        inputs = [layer.reshaped(1, weight.shape[0]) for layer in source.along(1)]
        for layer in inputs:
            call.space.tie(layer.labels.reshape(-1), rows.labels.reshape(-1))
            dead = layer.zero.reshape(-1) | rows.zero.reshape(-1)
            call.space.consume(layer.labels.reshape(-1), dead)
            call.space.consume(rows.labels.reshape(-1), dead)
        if not inputs or weight.shape[0] == groups:
            call.space.fix(rows.labels, call.why)
    outputs = groups * weight.shape[1]
    if columns is None:
        return Labelled((source.shape[0], outputs))
    return Labelled(
        (source.shape[0], outputs),
        (
            Layer(
                columns.labels.reshape(1, -1).repeat(1, groups), columns.zero.reshape(1, -1).repeat(1, groups)
            ),
        ),
    )


def _only(call: Call, weight: Labelled, dim: int) -> Layer | None:
    """Return the layer of a weight that varies along ``dim`` alone; others are kept."""
    found = weight.along(dim)
    for layer in found:
        if len(layer.dims) > 1 or layer is not found[0]:
            call.space.fix(layer.labels, call.why)
    return found[0] if found and len(found[0].dims) == 1 else None


def _as_channels(rows: Layer | None) -> tuple[Layer, ...]:
    return () if rows is None else (rows.reshaped(1, rows.labels.numel()),)
