"""What nets are made of: norms, convolutions with norm and activation, widths."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from lightning_structopt._checks import require_choice, require_list, require_whole
from lightning_structopt.blocks.activations import Activation, activation_module

Norm = Literal["batch", "layer"]


def require_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Return ``widths`` as a tuple.

    Raises:
        TypeError: If one isn't a whole number.
        ValueError: If there is none, or one is below 1.
    """
    require_list("widths", widths)
    found = tuple(widths)
    if not found:
        raise ValueError(
            "`widths` must name at least one layer. Found none. Give, for example, `widths=(64,)`."
        )
    for width in found:
        require_whole("widths", width, 1)
    return found


def require_norm(norm: object) -> None:
    """Raise unless ``norm`` is ``"batch"``, ``"layer"`` or None.

    Raises:
        ValueError: If it isn't.
    """
    require_choice("norm", norm, ("batch", "layer", None))


def norm_of_images(norm: Norm | None, channels: int) -> list[nn.Module]:
    """Return the norm over channels, as a list of one or none; the layer norm of images is a group norm."""
    if norm is None:
        return []
    return [nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(1, channels)]


def norm_of_features(norm: Norm | None, features: int) -> list[nn.Module]:
    """Return the norm over features, as a list of one or none."""
    if norm is None:
        return []
    return [nn.BatchNorm1d(features) if norm == "batch" else nn.LayerNorm(features)]


def convolution(
    inputs: int,
    outputs: int,
    kernel_size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: Norm | None = "batch",
    activation: Activation | None = "relu",
) -> list[nn.Module]:
    """Return a convolution that keeps the size at stride 1, its norm and its activation."""
    return [
        nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups, bias=norm is None),
        *norm_of_images(norm, outputs),
        *([] if activation is None else [activation_module(activation)]),
    ]
