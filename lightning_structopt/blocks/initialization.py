"""Initial weights that keep the size of a signal from layer to layer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_type
from lightning_structopt._undisturbed import undisturbed
from lightning_structopt.blocks.activations import Activation, gain

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Module = TypeVar("_Module", bound=nn.Module)


class Initialization(ABC):
    """How the weights of linear and convolutional layers start; biases start at zero."""

    @abstractmethod
    def fill(self, weight: Tensor, gain: float) -> None:
        """Fill ``weight`` in place.

        Args:
            weight: Of shape (out, in, ...).
            gain: What makes up for the activation.
        """


@dataclass(frozen=True)
class Kaiming(Initialization):
    r"""Variance :math:`g^2 / n`, where :math:`n` is the fan and :math:`g` fits the activation.

    He et al., "Delving Deep into Rectifiers", 2015 (https://arxiv.org/abs/1502.01852).

    Args:
        mode: ``"fan_in"`` keeps the size of activations, ``"fan_out"`` that of gradients.
        distribution: ``"normal"`` or ``"uniform"``.

    Raises:
        ValueError: If an argument is none of these.

    Example:
        >>> Kaiming(mode="fan_out")
        Kaiming(mode='fan_out', distribution='normal')
    """

    mode: Literal["fan_in", "fan_out"] = "fan_in"
    distribution: Literal["normal", "uniform"] = "normal"

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, ("fan_in", "fan_out"))
        require_choice("distribution", self.distribution, ("normal", "uniform"))

    @override
    def fill(self, weight: Tensor, gain: float) -> None:
        fan_in, fan_out = _fans(weight)
        _draw(weight, gain / (fan_in if self.mode == "fan_in" else fan_out) ** 0.5, self.distribution)


@dataclass(frozen=True)
class Xavier(Initialization):
    r"""Variance :math:`2 g^2 / (n_\text{in} + n_\text{out})`.

    Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.

    Args:
        distribution: ``"normal"`` or ``"uniform"``.

    Raises:
        ValueError: If ``distribution`` is neither.

    Example:
        >>> Xavier()
        Xavier(distribution='uniform')
    """

    distribution: Literal["normal", "uniform"] = "uniform"

    def __post_init__(self) -> None:
        require_choice("distribution", self.distribution, ("normal", "uniform"))

    @override
    def fill(self, weight: Tensor, gain: float) -> None:
        _draw(weight, gain * (2 / sum(_fans(weight))) ** 0.5, self.distribution)


@dataclass(frozen=True)
class Orthogonal(Initialization):
    """Orthonormal rows, or columns where there are fewer of those, times the gain.

    Saxe, McClelland and Ganguli, "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks", 2014 (https://arxiv.org/abs/1312.6120).

    Example:
        >>> Orthogonal()
        Orthogonal()
    """

    @override
    def fill(self, weight: Tensor, gain: float) -> None:
        nn.init.orthogonal_(weight, gain)


@dataclass(frozen=True)
class LSUV(Initialization):
    """Layer-sequential unit variance: orthonormal, then scaled so that each layer's outputs have variance 1 on a batch.

    With zero biases a layer's output is linear in its weight, so one division a layer is exact, and one pass over
    the batch serves all layers: each sees what the layers before give after their own division.

    Mishkin and Matas, "All you need is a good init", 2016 (https://arxiv.org/abs/1511.06422).

    Example:
        >>> LSUV()
        LSUV()
    """

    @override
    def fill(self, weight: Tensor, gain: float) -> None:
        nn.init.orthogonal_(weight)


def initialize(
    module: _Module,
    initialization: Initialization,
    *,
    activation: Activation = "relu",
    batch: Any = None,
) -> _Module:
    """Start the weights of all linear and convolutional layers anew, and set their biases to zero.

    Args:
        module: Changed in place.
        initialization: ``Kaiming``, ``Xavier``, ``Orthogonal``, ``LSUV`` or one of your own.
        activation: What the gain is to fit.
        batch: Real inputs, which ``LSUV`` needs: a tensor, or a tuple of arguments.

    Returns:
        The same module.

    Raises:
        TypeError: If ``initialization`` is something else.
        ValueError: If ``LSUV`` gets no batch, or a layer's outputs on it have no variance.

    Example:
        >>> net = initialize(nn.Sequential(nn.Linear(4, 4)), Orthogonal(), activation=nn.Identity)
        >>> torch.allclose(net[0].weight @ net[0].weight.T, torch.eye(4), atol=1e-6)
        True
    """
    require_type("initialization", initialization, Initialization)
    if isinstance(initialization, LSUV) and batch is None:
        raise ValueError(
            "`LSUV` needs a batch. Found none. Build the net with another initialization and call "
            "`initialize(net, LSUV(), batch=inputs)`."
        )
    scale = gain(activation)
    with torch.no_grad():
        for layer in _layers(module).values():
            initialization.fill(layer.weight, scale)
            if layer.bias is not None:
                layer.bias.zero_()
        if isinstance(initialization, LSUV):
            _scale_to_unit_variance(module, batch if isinstance(batch, tuple) else (batch,))
    return module


def _scale_to_unit_variance(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    names = {layer: name for name, layer in _layers(module).items()}

    def scale(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        deviation = float(output.std())
        if not 0 < deviation < float("inf"):
            raise ValueError(
                f"`LSUV` needs outputs that vary. Found a deviation of {deviation} in `{names[layer]}`. Give a batch "
                "of several different samples, and let no norm before that layer start at zero."
            )
        layer.weight.div_(deviation)  # type: ignore[operator]
        return output / deviation

    with undisturbed(module), torch.no_grad():
        handles = [layer.register_forward_hook(scale) for layer in names]
        try:
            module(*inputs)
        finally:
            for handle in handles:
                handle.remove()


def _layers(module: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in module.named_modules() if isinstance(part, _LAYERS)}


def _fans(weight: Tensor) -> tuple[int, int]:
    """Return how many weights enter an output, and how many leave an input."""
    taps = weight[0, 0].numel()
    return weight.shape[1] * taps, weight.shape[0] * taps


def _draw(weight: Tensor, deviation: float, distribution: str) -> None:
    if distribution == "normal":
        nn.init.normal_(weight, std=deviation)
    else:
        nn.init.uniform_(weight, -(3**0.5) * deviation, 3**0.5 * deviation)
