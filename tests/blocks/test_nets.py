"""Perceptron, convolutional and residual nets: shapes, parameter counts of the papers, residual sums by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.blocks import MLP, ConvNet, PaddedShortcut, ResidualBlock, ResidualNet, projection


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_residual_nets_have_the_parameters_of_the_paper(depth: int, millions: float) -> None:
    assert count(ResidualNet(depth)) / 1e6 == pytest.approx(millions, abs=0.0055 if millions < 1 else 0.05)
    layers = [m for m in ResidualNet(depth).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_projection_adds_its_parameters_only() -> None:
    more = count(ResidualNet(20, projection="convolution")) - count(ResidualNet(20))
    assert more == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert count(ResidualNet(20, shortcuts=False)) == count(ResidualNet(20))


@pytest.mark.parametrize("preactivation", [False, True])
@pytest.mark.parametrize("shape", ["pad", "convolution"])
@pytest.mark.parametrize("shortcuts", [True, False])
def test_residual_net_runs_and_trains(preactivation: bool, shape: str, shortcuts: bool) -> None:
    net = ResidualNet(
        8,
        1,
        5,
        widths=(4, 8, 6),
        projection=shape,
        preactivation=preactivation,
        shortcuts=shortcuts,
        activation="gelu",
    )
    output = net(torch.randn(3, 1, 16, 16))
    assert output.shape == (3, 5)
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert not any(isinstance(part, nn.ReLU) for part in net.modules())


@pytest.mark.parametrize("preactivation", [False, True])
def test_new_blocks_are_the_identity(preactivation: bool) -> None:
    net = ResidualNet(14, 3, 10, preactivation=preactivation, zero_init=True)
    inputs = torch.randn(4, 3, 16, 16)
    first = net.stages[0]
    signal = net.stem(inputs)
    torch.testing.assert_close(first(signal), signal, rtol=0, atol=0)
    assert not torch.equal(ResidualNet(14, preactivation=preactivation).stages[0](signal), signal)


class Seen(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, inputs: Tensor) -> Tensor:
        return self.run(inputs)


def test_a_block_is_the_sum_by_hand() -> None:
    body, shortcut = nn.Linear(4, 6), nn.Linear(4, 6)
    inputs = torch.randn(5, 4)
    expected = nn.functional.gelu(body(inputs) + shortcut(inputs))
    torch.testing.assert_close(ResidualBlock(body, shortcut, activation="gelu")(inputs), expected)


def test_stochastic_depth_drops_samples_and_keeps_the_mean() -> None:
    block = ResidualBlock(Seen(torch.ones_like), survival=0.8)
    outputs = block(torch.zeros(20_000, 3))
    assert set(outputs.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(outputs[:, 0], outputs[:, 2])  # a sample goes as a whole
    assert outputs.mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(block.eval()(torch.zeros(4, 3)), torch.ones(4, 3))


def test_survival_falls_linearly_with_depth() -> None:
    blocks = [b for b in ResidualNet(20, survival=0.5).modules() if isinstance(b, ResidualBlock)]
    assert [block.survival for block in blocks] == pytest.approx([1 - i / 9 * 0.5 for i in range(1, 10)])


def test_padded_shortcut_by_hand() -> None:
    images = torch.randn(2, 3, 6, 6)
    outputs = PaddedShortcut(3, 2)(images)
    assert torch.equal(outputs[:, 1:4], images[:, :, ::2, ::2])
    assert not outputs[:, [0, 4, 5]].any()
    assert projection(3, 6, 2)(images).shape == outputs.shape


@pytest.mark.parametrize("layer", ["plain", "separable", "bottleneck"])
def test_convnet_has_the_weights_of_its_formula(layer: str) -> None:
    net = ConvNet(8, (16, 32), 10, layer=layer, kernel_size=5, norm=None)
    weights = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 4)
    expected = {
        "plain": 25 * (8 * 16 + 16 * 32),
        "separable": 25 * 8 + 8 * 16 + 25 * 16 + 16 * 32,
        "bottleneck": 8 * 4 + 25 * 16 + 4 * 16 + 16 * 8 + 25 * 64 + 8 * 32,
    }[layer]
    assert weights == expected
    assert net(torch.randn(2, 8, 12, 12)).shape == (2, 10)


@pytest.mark.parametrize("norm", ["batch", "layer", None])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "mish", "hardswish", nn.Tanh])
def test_nets_train_with_every_norm_and_activation(norm: str | None, activation: object) -> None:
    for net, inputs in (
        (MLP(12, (8, 8), 3, norm=norm, activation=activation, dropout=0.1), torch.randn(4, 3, 2, 2)),
        (ConvNet(3, (4, 8), 3, norm=norm, activation=activation, dropout=0.1), torch.randn(4, 3, 4, 4)),
    ):
        net(inputs).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_deep_mlp_keeps_its_signal() -> None:
    net = MLP(64, (64,) * 30, 10, activation="gelu")
    assert 0.1 < net.hidden(torch.randn(256, 64)).square().mean().sqrt() < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResidualNet(21), "a multiple of 6.*Found `depth = 21`. Take 20 or 26"),
        (lambda: ResidualNet(2), "`depth` must be at least 8"),
        (lambda: ResidualNet(20, shortcuts=False, zero_init=True), "need `shortcuts`"),
        (lambda: ResidualNet(20, survival=0.0), r"`survival` must be in \(0, 1\]"),
        (lambda: ResidualBlock(nn.ReLU(), zero_init=True), "Found none in `ReLU`"),
        (
            lambda: ResidualBlock(nn.Linear(4, 3))(torch.zeros(2, 4)),
            r"Found \(2, 3\) from the body and \(2, 4\)",
        ),
        (lambda: MLP(4, (), 2), "`widths` must name at least one layer"),
        (lambda: MLP(4, (0,), 2), "`widths` must be at least 1"),
        (lambda: MLP(4, (4,), 2, dropout=1.0), "`dropout` must be in"),
        (lambda: MLP(4, (4,), 2, norm="group"), "`norm` must be"),
        (lambda: ConvNet(1, (4,), 2, kernel_size=4), "`kernel_size` must be odd"),
        (lambda: ConvNet(1, (4,), 2, layer="dense"), "`layer` must be"),
    ],
)
def test_bad_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_body_must_be_a_module() -> None:
    with pytest.raises(TypeError, match="Did you mean `Linear"):
        ResidualBlock(nn.Linear)
