"""A convolutional net: the same task as a perceptron's, with fewer parameters."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_whole
from lightning_structopt.blocks.activations import Activation
from lightning_structopt.blocks.initialization import Initialization, Kaiming, initialize
from lightning_structopt.blocks.parts import Norm, convolution, require_norm, require_widths


class ConvNet(nn.Module):
    r"""Convolutions that halve the image between them, the mean over what is left of it, and a linear head.

    A layer of :math:`k \times k` taps from :math:`m` to :math:`n` channels takes :math:`k^2 m n` weights when it is
    ``"plain"``; :math:`k^2 m + m n` when it is ``"separable"``: one filter a channel, then a mix of channels
    (Howard et al., "MobileNets", 2017, https://arxiv.org/abs/1704.04861); and :math:`m b + k^2 b^2 + b n` as a
    ``"bottleneck"`` of :math:`b = n / 4` channels (He et al., 2016, https://arxiv.org/abs/1512.03385).

    Args:
        in_channels: Channels of the images, of shape (batch, channels, height, width).
        widths: Channels after each layer. Images are halved after all but the last, so they need
            :math:`2^{layers - 1}` pixels on a side.
        classes: Outputs.
        layer: ``"plain"``, ``"separable"`` or ``"bottleneck"``.
        kernel_size: Taps on a side, odd.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"mish"``, ``"hardswish"`` or a module class.
        norm: ``"batch"``, ``"layer"`` or None.
        dropout: Probability of dropping an input of the head, in [0, 1).
        initialization: How weights start, with a gain that fits the activation.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> ConvNet(1, (16, 32), 10, layer="separable")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        classes: int,
        *,
        layer: Literal["plain", "separable", "bottleneck"] = "plain",
        kernel_size: int = 3,
        activation: Activation = "relu",
        norm: Norm | None = "batch",
        dropout: float = 0.0,
        initialization: Initialization = Kaiming(),  # noqa: B008  # a frozen value
    ) -> None:
        super().__init__()
        require_whole("in_channels", in_channels, 1)
        require_whole("classes", classes, 1)
        require_choice("layer", layer, ("plain", "separable", "bottleneck"))
        require_norm(norm)
        require_in("dropout", dropout, 0, 1, closed="left")
        _require_odd(kernel_size)
        parts: list[nn.Module] = []
        last = in_channels
        for index, width in enumerate(require_widths(widths)):
            parts += [nn.MaxPool2d(2)] if index else []
            parts += _layer(layer, last, width, kernel_size, norm, activation)
            last = width
        self.features = nn.Sequential(*parts)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(last, classes)
        initialize(self, initialization, activation=activation)

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.pool(self.features(images))))
        return logits


def _layer(
    kind: str, inputs: int, outputs: int, taps: int, norm: Norm | None, activation: Activation
) -> list[nn.Module]:
    if kind == "plain":
        return convolution(inputs, outputs, taps, norm=norm, activation=activation)
    if kind == "separable":
        return [
            *convolution(inputs, inputs, taps, groups=inputs, norm=norm, activation=activation),
            *convolution(inputs, outputs, 1, norm=norm, activation=activation),
        ]
    narrow = max(1, outputs // 4)
    return [
        *convolution(inputs, narrow, 1, norm=norm, activation=activation),
        *convolution(narrow, narrow, taps, norm=norm, activation=activation),
        *convolution(narrow, outputs, 1, norm=norm, activation=activation),
    ]


def _require_odd(kernel_size: object) -> None:
    require_whole("kernel_size", kernel_size, 1)
    assert isinstance(kernel_size, int)
    if kernel_size % 2 == 0:
        raise ValueError(
            f"`kernel_size` must be odd, so that an image keeps its size. Found `kernel_size = {kernel_size}`."
        )
