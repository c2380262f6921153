"""Residual nets for small images."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_type, require_whole
from lightning_structopt.blocks.activations import Activation, activation_module
from lightning_structopt.blocks.initialization import Initialization, Kaiming, initialize
from lightning_structopt.blocks.parts import convolution, require_widths
from lightning_structopt.blocks.residual import PaddedShortcut, ResidualBlock, zero_last
from lightning_structopt.blocks.residual import projection as projected


class ResidualNet(nn.Module):
    r"""A stem, stages of residual blocks of two 3x3 convolutions, the mean over the image, and a linear head.

    Each stage has :math:`n` blocks and halves the image on entry, but for the first: the depth is
    :math:`2 n \cdot \text{stages} + 2`. With the defaults these are the nets for CIFAR of He et al., "Deep Residual
    Learning for Image Recognition", 2016 (https://arxiv.org/abs/1512.03385): 0.27 million parameters at depth 20,
    0.46 at 32, 0.85 at 56. The blocks are in ``stages``, where each may be replaced, say by a ``GatedBlock``.

    Args:
        depth: Layers with weights: 8, 14, 20, 26, 32, ... for three stages.
        in_channels: Channels of the images.
        classes: Outputs.
        widths: Channels of each stage.
        shortcuts: Whether there is a way around each block; without, it is the plain net of the paper.
        projection: ``"pad"`` (option A of the paper, without parameters) or ``"convolution"`` (option B), where
            channels change.
        preactivation: Norm and activation before each convolution, and nothing after the sum.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"mish"``, ``"hardswish"`` or a module class.
        survival: The probability that the last block survives, in (0, 1]; it falls linearly from 1 at the stem.
        zero_init: Let the last norm of each block start at zero, or its last convolution in pre-activation.
        initialization: How weights start, with a gain that fits the activation.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, no whole number of blocks makes that depth, or the net has no
            shortcuts but options of them.

    Example:
        >>> import torch
        >>> ResidualNet(20)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int = 20,
        in_channels: int = 3,
        classes: int = 10,
        *,
        widths: Sequence[int] = (16, 32, 64),
        shortcuts: bool = True,
        projection: Literal["pad", "convolution"] = "pad",
        preactivation: bool = False,
        activation: Activation = "relu",
        survival: float = 1.0,
        zero_init: bool = False,
        initialization: Initialization = Kaiming("fan_out"),  # noqa: B008  # a frozen value
    ) -> None:
        super().__init__()
        require_whole("in_channels", in_channels, 1)
        require_whole("classes", classes, 1)
        require_choice("projection", projection, ("pad", "convolution"))
        require_in("survival", survival, 0, 1, closed="right")
        for name, flag in (
            ("shortcuts", shortcuts),
            ("preactivation", preactivation),
            ("zero_init", zero_init),
        ):
            require_type(name, flag, bool)
        _require_shortcuts_for(shortcuts, survival, zero_init)
        widths = require_widths(widths)
        self._pads, self._activation = projection == "pad", activation
        self._shortcuts, self._preactivation = shortcuts, preactivation
        blocks = _blocks_per_stage(depth, len(widths))
        stem = convolution(in_channels, widths[0], 3, activation=activation)
        self.stem = nn.Sequential(*stem[: 1 if preactivation else 3])
        self.stages = nn.Sequential(*self._stages(widths, blocks, survival))
        end = [nn.BatchNorm2d(widths[-1]), activation_module(activation)] if preactivation else []
        self.pool = nn.Sequential(*end, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(widths[-1], classes)
        initialize(self, initialization, activation=activation)
        if zero_init:
            self._zero_blocks()

    @override
    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.stages(self.stem(images))))
        return logits

    def _stages(self, widths: tuple[int, ...], blocks: int, survival: float) -> list[nn.Module]:
        total, made, last = blocks * len(widths), 0, widths[0]
        stages: list[nn.Module] = []
        for stage, width in enumerate(widths):
            parts = []
            for index in range(blocks):
                made += 1
                stride = 2 if stage and not index else 1
                parts.append(self._block(last, width, stride, 1 - made / total * (1 - survival)))
                last = width
            stages.append(nn.Sequential(*parts))
        return stages

    def _block(self, inputs: int, outputs: int, stride: int, survival: float) -> nn.Module:
        body = nn.Sequential(*self._body(inputs, outputs, stride))
        after = None if self._preactivation else self._activation
        if not self._shortcuts:
            return body if after is None else nn.Sequential(body, activation_module(after))
        shortcut = self._shortcut(inputs, outputs, stride)
        return ResidualBlock(body, shortcut, activation=after, survival=survival)

    def _body(self, inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        if not self._preactivation:
            first = convolution(inputs, outputs, 3, stride=stride, activation=self._activation)
            return [*first, *convolution(outputs, outputs, 3, activation=None)]
        parts: list[nn.Module] = []
        for entering, step in ((inputs, stride), (outputs, 1)):
            parts += [nn.BatchNorm2d(entering), activation_module(self._activation)]
            parts.append(nn.Conv2d(entering, outputs, 3, step, 1, bias=False))
        return parts

    def _shortcut(self, inputs: int, outputs: int, stride: int) -> nn.Module | None:
        if stride == 1 and inputs == outputs:
            return None
        if self._pads and outputs >= inputs:
            return PaddedShortcut(outputs - inputs, stride)
        return projected(inputs, outputs, stride, norm=not self._preactivation)

    def _zero_blocks(self) -> None:
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                zero_last(block.body)


def _blocks_per_stage(depth: int, stages: int) -> int:
    require_whole("depth", depth, 2 + 2 * stages)
    blocks, rest = divmod(depth - 2, 2 * stages)
    if rest:
        lower, upper = (2 + 2 * stages * count for count in (blocks, blocks + 1))
        raise ValueError(
            f"`depth` must be 2 and a multiple of {2 * stages}: two layers a block, as many blocks in each of "
            f"{stages} stages. Found `depth = {depth}`. Take {lower} or {upper}."
        )
    return blocks


def _require_shortcuts_for(shortcuts: bool, survival: float, zero_init: bool) -> None:
    if not shortcuts and (survival < 1 or zero_init):
        raise ValueError(
            "`survival` and `zero_init` need `shortcuts`: nothing would pass a block that is dropped or zero. Found "
            f"`shortcuts = False` with `survival = {survival}` and `zero_init = {zero_init}`. Leave them out."
        )
