"""Initial weights against closed forms and against torch's own, and signals that keep their size."""

import math

import pytest
import torch
from torch import nn

from lightning_structopt.blocks import LSUV, Kaiming, Orthogonal, Xavier, initialize
from lightning_structopt.blocks.activations import activation_module, gain

NAMES = ["relu", "gelu", "silu", "mish", "hardswish"]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [("relu", math.sqrt(2)), (nn.Identity, 1.0), (nn.ReLU6, 1.4142), (nn.SELU, 1.0), (nn.Sigmoid, 1.8462)],
    ids=["relu", "identity", "relu6", "selu", "sigmoid"],
)
def test_gain_is_that_of_the_second_moment(activation: object, expected: float) -> None:
    assert gain(activation) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_gain_keeps_a_gaussian_signal(name: str) -> None:
    signal = activation_module(name)(torch.randn(200_000, dtype=torch.float64))
    assert gain(name) * signal.square().mean().sqrt() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(30, 50), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(4, 6, 5)],
    ids=str,
)
def test_kaiming_is_torchs_own(layer: nn.Module, mode: str, distribution: str) -> None:
    torch.manual_seed(3)
    initialize(layer, Kaiming(mode, distribution))
    found = layer.weight.clone()
    torch.manual_seed(3)
    getattr(nn.init, f"kaiming_{distribution}_")(layer.weight, mode=mode, nonlinearity="relu")
    torch.testing.assert_close(found, layer.weight, rtol=1e-4, atol=1e-6)
    assert not layer.bias.any()


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_xavier_is_torchs_own(distribution: str) -> None:
    layer = nn.Conv2d(8, 12, 3)
    torch.manual_seed(3)
    initialize(layer, Xavier(distribution), activation=nn.Identity)
    found = layer.weight.clone()
    torch.manual_seed(3)
    getattr(nn.init, f"xavier_{distribution}_")(layer.weight)
    torch.testing.assert_close(found, layer.weight, rtol=1e-4, atol=1e-6)


def test_orthogonal_rows_times_the_gain() -> None:
    layer = initialize(nn.Conv2d(8, 12, 3), Orthogonal())
    rows = layer.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(12), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_lsuv_gives_every_layer_variance_one_on_the_batch(name: str) -> None:
    widths = [20, 64, 64, 64, 10]
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), activation_module(name)]
    net = nn.Sequential(*layers, nn.Dropout(0.9))
    batch = 7 * torch.randn(32, 20) + 1
    initialize(net, LSUV(), batch=batch)
    assert net.training
    signal = batch
    for layer in net[:-1]:
        signal = layer(signal)
        if isinstance(layer, nn.Linear):
            assert signal.std().item() == pytest.approx(1, abs=1e-4)
            rows = layer.weight @ layer.weight.T if len(layer.weight) <= layer.weight.shape[1] else None
            if rows is not None:  # still orthogonal, and only scaled
                torch.testing.assert_close(rows / rows[0, 0], torch.eye(len(rows)), rtol=1e-3, atol=1e-4)


def test_lsuv_leaves_running_statistics_alone() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    initialize(net, LSUV(), batch=(torch.randn(4, 1, 8, 8),))
    assert not net[1].running_mean.any()
    assert net[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initialize(nn.Linear(2, 2), LSUV()), "`LSUV` needs a batch"),
        (
            lambda: initialize(nn.Linear(2, 2), LSUV(), batch=torch.zeros(4, 2)),
            "outputs that vary. Found a deviation",
        ),
        (lambda: Kaiming("fan"), "`mode` must be 'fan_in' or 'fan_out'"),
        (lambda: Xavier("gauss"), "`distribution` must be"),
        (lambda: activation_module("tanh"), "`activation` must be one of 'relu'"),
    ],
)
def test_bad_values(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: initialize(nn.Linear(2, 2), Kaiming), r"Did you mean `Kaiming\(\)`"),
        (lambda: activation_module(nn.ReLU()), "Give the class `ReLU`"),
        (lambda: activation_module(3), "must be a name or a module class. Found 3"),
    ],
)
def test_bad_types(call: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
