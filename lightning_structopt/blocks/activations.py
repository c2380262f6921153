"""Activations by name, and how much they shrink a signal."""

from typing import Literal

import torch
from torch import nn

ActivationName = Literal["relu", "gelu", "silu", "mish", "hardswish"]
Activation = ActivationName | type[nn.Module]

_NAMED: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
}


def activation_module(activation: Activation) -> nn.Module:
    """Return a new activation.

    Args:
        activation: A name, or a module class that is built without arguments.

    Raises:
        TypeError: If it is a module rather than its class.
        ValueError: If there is none of that name.

    Example:
        >>> activation_module("silu")
        SiLU()
    """
    if isinstance(activation, str):
        if activation not in _NAMED:
            allowed = ", ".join(repr(name) for name in _NAMED)
            raise ValueError(
                f"`activation` must be one of {allowed}, or a module class. Found `activation = {activation!r}`."
            )
        return _NAMED[activation]()
    if not (isinstance(activation, type) and issubclass(activation, nn.Module)):
        kind = type(activation).__name__
        remedy = (
            f" Give the class `{kind}`: each layer gets one of its own." if _is_module(activation) else ""
        )
        raise TypeError(f"`activation` must be a name or a module class. Found {activation!r}.{remedy}")
    try:
        return activation()
    except TypeError as error:
        raise TypeError(
            f"`activation` must be a module class that takes no arguments. Found `{activation.__name__}`: {error}."
        ) from error


def gain(activation: Activation) -> float:
    r"""Return what weights are multiplied by to make up for an activation.

    :math:`g = (\mathrm{E}\, f(z)^2)^{-1/2}` for a standard normal :math:`z`: with it the second moment of a signal
    stays the same from layer to layer. For ReLU that is :math:`\sqrt 2`; He et al., "Delving Deep into
    Rectifiers", 2015 (https://arxiv.org/abs/1502.01852). It is integrated numerically, so it fits any activation.

    Args:
        activation: A name, or a module class.

    Returns:
        The gain.

    Raises:
        ValueError: If the activation is zero everywhere, or has no finite second moment.

    Example:
        >>> round(gain("relu"), 4)
        1.4142
    """
    grid = torch.linspace(-10, 10, 20001, dtype=torch.float64)
    density = torch.exp(-(grid**2) / 2)
    module = activation_module(activation).double().eval()
    with torch.no_grad():
        moment = float((module(grid) ** 2 * density).sum() / density.sum())
    if not 0 < moment < float("inf"):
        raise ValueError(
            f"`activation` must let a signal through. Found `{module}` with a second moment of {moment}. "
            "Choose another."
        )
    return float(moment**-0.5)


def _is_module(value: object) -> bool:
    return isinstance(value, nn.Module)
