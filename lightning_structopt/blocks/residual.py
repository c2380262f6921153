"""Blocks with a way around them."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from lightning_structopt._checks import require_in, require_type
from lightning_structopt.blocks.activations import Activation, activation_module
from lightning_structopt.blocks.rows import over_rows, require_same_shape

_WITH_SCALE = (
    _BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
)


class ResidualBlock(nn.Module):
    r"""A body and a shortcut, :math:`y = a(s(x) + \tfrac{b}{p} F(x))` with :math:`b \sim \mathrm{Bernoulli}(p)`.

    The activation after the sum makes it a post-activation block (He et al., "Deep Residual Learning for Image
    Recognition", 2016, https://arxiv.org/abs/1512.03385); without one, and with norm and activation first in the
    body, it is a pre-activation block (He et al., "Identity Mappings in Deep Residual Networks", 2016,
    https://arxiv.org/abs/1603.05027).

    Stochastic depth drops the body sample by sample, in training only (Huang et al., "Deep Networks with Stochastic
    Depth", 2016, https://arxiv.org/abs/1603.09382). What survives is divided by :math:`p`, so that evaluation is the
    plain sum; all of the body runs either way.

    Args:
        body: :math:`F`, whose outputs have the shape of the shortcut's.
        shortcut: :math:`s`, such as :func:`projection`; the identity if not given.
        activation: :math:`a`, after the sum: a name or a module class.
        survival: The probability :math:`p`, in (0, 1].
        zero_init: Let the body start at zero, through the scale of its last norm, or through its last layer where no
            norm follows that. So a new block is the shortcut.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``survival`` is out of range, or ``zero_init`` finds nothing to set to zero. In ``forward``: if
            the shapes of body and shortcut differ.

    Example:
        >>> import torch
        >>> block = ResidualBlock(nn.Linear(4, 4), zero_init=True)
        >>> inputs = torch.randn(2, 4)
        >>> torch.equal(block(inputs), inputs)
        True
    """

    def __init__(
        self,
        body: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        activation: Activation | None = None,
        survival: float = 1.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        require_type("body", body, nn.Module)
        if shortcut is not None:
            require_type("shortcut", shortcut, nn.Module)
        require_in("survival", survival, 0, 1, closed="right")
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = nn.Identity() if activation is None else activation_module(activation)
        self.survival = survival
        require_type("zero_init", zero_init, bool)
        if zero_init:
            zero_last(body)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        around, through = self.shortcut(inputs), self.body(inputs)
        require_same_shape("ResidualBlock", through, around)
        if self.training and self.survival < 1:
            survives = around.new_empty(len(around)).bernoulli_(self.survival)
            through = through * over_rows(survives / self.survival, through)
        output: Tensor = self.activation(around + through)
        return output

    @override
    def extra_repr(self) -> str:
        return f"survival={self.survival}" if self.survival < 1 else ""


class PaddedShortcut(nn.Module):
    """Takes every ``stride``-th pixel and pads channels with zeros: a shortcut without parameters.

    Option A of He et al., 2016 (https://arxiv.org/abs/1512.03385), which its nets for CIFAR use.

    Args:
        more_channels: How many to add, half of them in front.
        stride: The step in height and width.

    Example:
        >>> import torch
        >>> PaddedShortcut(4, 2)(torch.ones(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """

    def __init__(self, more_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.more_channels, self.stride = more_channels, stride

    @override
    def forward(self, images: Tensor) -> Tensor:
        front = self.more_channels // 2
        small = images[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(small, (0, 0, 0, 0, front, self.more_channels - front))

    @override
    def extra_repr(self) -> str:
        return f"{self.more_channels}, stride={self.stride}"


def projection(in_channels: int, out_channels: int, stride: int = 1, *, norm: bool = True) -> nn.Module:
    """Return a shortcut between different shapes: a 1x1 convolution, with a norm (option B of He et al., 2016).

    Args:
        in_channels: Channels of the inputs.
        out_channels: Channels of the outputs.
        stride: The step in height and width.
        norm: Whether a BatchNorm follows, as in post-activation blocks.

    Returns:
        The module.

    Example:
        >>> import torch
        >>> projection(4, 8, stride=2)(torch.ones(1, 4, 6, 6)).shape
        torch.Size([1, 8, 3, 3])
    """
    convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=not norm)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels)) if norm else convolution


def zero_last(body: nn.Module) -> None:
    """Set the scale of the last norm or layer of ``body`` to zero, with its bias.

    Raises:
        ValueError: If there is none.
    """
    parts = [part for part in body.modules() if isinstance(part, _WITH_SCALE) and part.weight is not None]
    if not parts:
        raise ValueError(
            f"`zero_init` needs a norm or layer with a weight in the body. Found none in `{type(body).__name__}`. "
            "Leave `zero_init` out, and start your own last layer at zero."
        )
    nn.init.zeros_(parts[-1].weight)
    if parts[-1].bias is not None:
        nn.init.zeros_(parts[-1].bias)
