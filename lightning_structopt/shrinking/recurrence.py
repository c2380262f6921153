"""LSTM, GRU and plain recurrent layers and cells: one hidden size for all gates, layers and directions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking.labels import Labelled, Layer
from lightning_structopt.shrinking.operators import Call, Value


def recurrent(call: Call) -> Value:
    """Tie the gates' blocks, and what is fed back, to one hidden size."""
    source, flags = call.tensor("input"), call.arguments
    weights = [call.of(each) for each in flags["params"]]
    each_has = 4 if flags["has_biases"] else 2
    directions = 2 if flags["bidirectional"] else 1
    if source.ndim != 3 or len(weights) != flags["num_layers"] * directions * each_has:
        return call.fix_all()  # without a batch, or with a projection
    return _of_cells(
        call, [weights[at : at + each_has] for at in range(0, len(weights), each_has)], directions
    )


def cell(call: Call) -> Value:
    """One step of a recurrent layer."""
    names = [name for name in ("w_ih", "w_hh", "b_ih", "b_hh") if call.given(name)]
    return _of_cells(call, [[call.tensor(name) for name in names]], 1)


def _of_cells(call: Call, cells: list[list[Value]], directions: int) -> Value:
    hidden = _columns(cells[0][1])
    if hidden is None or not _starts_with(call, hidden.labels):
        return call.fix_all()
    for each in cells:
        _tie_cell(call, each, hidden.labels)
    _feed(call, call.tensor("input"), cells, hidden, directions)
    return _results(call, hidden.labels, directions)


def _starts_with(call: Call, hidden: Tensor) -> bool:
    """Tie the first hidden states to the hidden size; False if they are data, which no one makes smaller."""
    states = call.arguments["hx"]
    for node in states if isinstance(states, (list, tuple)) else [states]:
        state = call.of(node)
        assert isinstance(state, Labelled)
        layers = state.along(state.ndim - 1)
        if not layers:
            if not _is_made_for_it(node):
                return False
            # Zeros of whatever size it takes: their literals are counted anew.
            labels = hidden.reshape(*[1] * (state.ndim - 1), -1)
            call.know(node, Labelled(state.shape, (_layer(labels),)))
        for layer in layers:
            call.space.tie(layer.labels, hidden.reshape(-1))
    return True


def _is_made_for_it(node: Any) -> bool:
    made = isinstance(node, fx.Node) and str(node.target) in {"aten.zeros.default", "aten.full.default"}
    # Where others read it too, they might need it as large as it is.
    return made and all("_cell" in str(user.target) or user.target in _LAYERS for user in node.users)


_LAYERS = {getattr(torch.ops.aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


def _layer(labels: Tensor) -> Layer:
    return Layer(labels, torch.zeros_like(labels, dtype=torch.bool))


def _columns(value: Value) -> Layer | None:
    assert isinstance(value, Labelled)
    return next(iter(value.along(1)), None) if value.ndim == 2 else None


def _tie_cell(call: Call, cell: Sequence[Value], hidden: Tensor) -> None:
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
    last = source.ndim - 1
    for number, cell in enumerate(cells):
        inputs = _columns(cell[0])
        if inputs is None:
            continue
        if number >= directions:
            call.space.tie(inputs.labels, between)
            call.space.consume(inputs.labels, inputs.zero)
            continue
        given = source.along(last)
        for layer in given:
            call.space.tie(layer.labels.reshape(-1, source.shape[last]), inputs.labels)
            dead = layer.zero.reshape(-1, source.shape[last]) | inputs.zero
            call.space.consume(layer.labels.reshape(-1, source.shape[last]), dead)
            call.space.consume(inputs.labels, dead.all(0, keepdim=True))
        if not given:
            call.space.fix(inputs.labels, call.why)


def _results(call: Call, hidden: Tensor, directions: int) -> Value:
    def parts() -> Iterator[Labelled]:
        for shape in call.shapes:
            labels = hidden.reshape(-1)
            if shape[-1] != labels.numel():
                labels = labels.repeat(directions)
            yield Labelled(shape, (_layer(labels.reshape(*[1] * (len(shape) - 1), -1)),))

    results = tuple(parts())
    return results if isinstance(call.node.meta.get("val"), (tuple, list)) else results[0]
