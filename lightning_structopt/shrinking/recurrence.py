"""LSTM, GRU and plain recurrent layers: one hidden size for all gates, layers and directions."""

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking.labels import Labelled, Layer
from lightning_structopt.shrinking.operators import Call, Value


def recurrent(call: Call) -> Value:
    """Tie the gates' blocks, and what is fed back, to one hidden size."""
    source, flags = call.tensor("input"), call.arguments
    if source.ndim != 3 or not _starts_at_zero(call):
        return call.fix_all()
    weights = [call.of(each) for each in flags["params"]]
    each_has = 4 if flags["has_biases"] else 2
    directions = 2 if flags["bidirectional"] else 1
    if len(weights) != flags["num_layers"] * directions * each_has:
        return call.fix_all()  # with a projection
    cells = [weights[at : at + each_has] for at in range(0, len(weights), each_has)]
    hidden = _columns(cells[0][1])
    if hidden is None:
        return call.fix_all()
    for cell in cells:
        _tie_cell(call, cell, hidden.labels)
    _feed(call, source, cells, hidden, directions)
    return _results(call, hidden.labels, directions)


def _starts_at_zero(call: Call) -> bool:
    """Tell whether the first hidden state is made of zeros, of which there are as many as it takes."""
    states = call.arguments["hx"]
    nodes = states if isinstance(states, (list, tuple)) else [states]
    return all(isinstance(each, fx.Node) and "zeros" in str(each.target) for each in nodes)


def _columns(value: Value) -> Layer | None:
    assert isinstance(value, Labelled)
    return next(iter(value.along(1)), None) if value.ndim == 2 else None


def _tie_cell(call: Call, cell: list[Value], hidden: Tensor) -> None:
    hidden = hidden.reshape(1, -1)
    for weight in cell:
        assert isinstance(weight, Labelled)
        for layer in weight.along(0):
            call.space.tie(layer.labels.reshape(-1, hidden.numel()), hidden)
    back = _columns(cell[1])
    assert back is not None
    call.space.tie(back.labels, hidden)
    call.space.consume(back.labels, back.zero)


def _feed(call: Call, source: Labelled, cells: list[list[Value]], hidden: Layer, directions: int) -> None:
    """Tie the inputs of the first cells to the source, those of the others to the outputs of the cells before."""
    between = hidden.labels.reshape(1, -1).repeat(1, directions)
    for number, cell in enumerate(cells):
        inputs = _columns(cell[0])
        if inputs is None:
            continue
        if number >= directions:
            call.space.tie(inputs.labels, between)
            call.space.consume(inputs.labels, inputs.zero)
            continue
        given = source.along(2)
        for layer in given:
            call.space.tie(layer.labels.reshape(-1, source.shape[2]), inputs.labels)
            dead = layer.zero.reshape(-1, source.shape[2]) | inputs.zero
            call.space.consume(layer.labels.reshape(-1, source.shape[2]), dead)
            call.space.consume(inputs.labels, dead.all(0, keepdim=True))
        if not given:
            call.space.fix(inputs.labels, call.why)


def _results(call: Call, hidden: Tensor, directions: int) -> Value:
    results = []
    for shape in call.shapes:
        labels = hidden.reshape(-1)
        if shape[-1] != labels.numel():
            labels = labels.repeat(directions)
        labels = labels.reshape(*[1] * (len(shape) - 1), -1)
        results.append(Labelled(shape, (Layer(labels, torch.zeros_like(labels, dtype=torch.bool)),)))
    return tuple(results)
