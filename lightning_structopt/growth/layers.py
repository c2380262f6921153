"""Layers that compute nothing new until they are trained."""

import torch
from torch import Tensor, nn
from typing_extensions import override

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ResidualLayer(nn.Module):
    """Adds what a body computes to its input, :math:`y = x + F(x)`.

    Args:
        body: :math:`F`, whose output has the shape of its input.

    Example:
        >>> ResidualLayer(nn.Linear(3, 3))(torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = inputs + self.body(inputs)
        return result


def same_size(width: int, places: int, kernel_size: int, bias: bool = True) -> nn.Module:
    """Return a layer from ``width`` features, or channels of an image, to as many.

    Args:
        width: Features or channels.
        places: How many dimensions of places follow the channels; 0 for features in the last dimension.
        kernel_size: Of a convolution; odd.
        bias: Whether it has a bias.
    """
    if not places:
        return nn.Linear(width, width, bias=bias)
    return _CONVOLUTIONS[places](width, width, kernel_size, padding=kernel_size // 2, bias=bias)


@torch.no_grad()
def identity(width: int, places: int, kernel_size: int) -> nn.Module:
    """Return a linear layer or convolution that gives back its input."""
    layer = same_size(width, places, kernel_size)
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    weight.zero_()
    centre: tuple[slice | int, ...] = (slice(None), slice(None)) + (kernel_size // 2,) * places
    weight[centre] = torch.eye(width)
    bias.zero_()
    return layer


@torch.no_grad()
def zero_residual(width: int, places: int, kernel_size: int, norm: bool) -> ResidualLayer:
    """Return a residual block whose body gives zero, as its last layer or norm is zero.

    Args:
        width: Features or channels.
        places: How many dimensions of places follow the channels.
        kernel_size: Of its convolutions.
        norm: Whether a batch norm follows each of its two layers.
    """
    layers = [same_size(width, places, kernel_size, bias=not norm) for _ in range(2)]
    norms = [_BATCH_NORMS[places](width) for _ in range(2)] if norm else []
    if norm:
        nn.init.zeros_(norms[-1].weight)
        return ResidualLayer(nn.Sequential(layers[0], norms[0], nn.ReLU(), layers[1], norms[1]))
    for parameter in layers[1].parameters():
        parameter.zero_()
    return ResidualLayer(nn.Sequential(layers[0], nn.ReLU(), layers[1]))
