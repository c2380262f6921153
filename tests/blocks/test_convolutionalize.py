"""Dense heads that become the mean over the image: same outputs on constant maps, fewer weights, other sizes."""

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.blocks import MLP, PooledLinear, convolutionalize


class Functional(nn.Module):
    """Flattens in `forward`, as torchvision's nets do, with dropout between."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(6 * 36, 8), nn.ReLU(), nn.Linear(8, 3, bias=False)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(torch.flatten(torch.max_pool2d(self.features(images), 1), 1))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.ReLU(), nn.Linear(6 * 36, 3))


@pytest.mark.parametrize("make", [Functional, sequential])
def test_same_outputs_on_constant_maps_and_other_sizes_after(make: object) -> None:
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    small = convolutionalize(net, torch.randn(2, 1, 8, 8))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    constant = torch.ones(3, 1, 8, 8) * torch.tensor([-1.0, 0.5, 2.0])[:, None, None, None]
    torch.testing.assert_close(small.eval()(constant), net.eval()(constant), rtol=1e-4, atol=1e-5)
    assert small(torch.randn(2, 1, 20, 12)).shape == (2, 3)
    pooled = [part for part in small.modules() if isinstance(part, PooledLinear)]
    assert [part.mix.in_features for part in pooled] == [6]


def test_is_a_convolution_and_the_mean() -> None:
    small = convolutionalize(sequential(), torch.randn(2, 1, 8, 8))
    images = torch.randn(2, 1, 8, 8)
    maps = torch.relu(small[0](images))
    weight = small[3].mix.weight[:, :, None, None]
    expected = nn.functional.conv2d(maps, weight, small[3].mix.bias).mean((2, 3))
    torch.testing.assert_close(small(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "net",
    [MLP(64, (8,), 3), nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 3))],
    ids=["MLP", "1x1"],
)
def test_nothing_to_gain(net: nn.Module) -> None:
    inputs = torch.randn(2, 64) if isinstance(net, MLP) else torch.randn(2, 1, 8, 8)
    with pytest.raises(ValueError, match="needs a linear layer that reads a flattened image.*Found none"):
        convolutionalize(net, inputs)


def test_features_must_divide() -> None:
    with pytest.raises(ValueError, match="flattened pixels of 4 channels. Found 6 features"):
        PooledLinear(4, 2)(torch.zeros(1, 6))
