"""Dense heads on feature maps, with one weight a channel instead of one a pixel."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_structopt._undisturbed import undisturbed

_Module = TypeVar("_Module", bound=nn.Module)
_LINEAR = nn.functional.linear


class PooledLinear(nn.Module):
    r"""The mean over an image of flattened features, and a linear layer over their channels: a 1x1 convolution.

    Args:
        channels: Of the features that were flattened to (batch, channels * pixels), for any number of pixels.
        out_features: Outputs.
        bias: Whether there is a bias.

    Raises:
        ValueError: In ``forward``: if the features don't divide by the channels.

    Example:
        >>> PooledLinear(8, 10)(torch.zeros(2, 8 * 49)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.mix = nn.Linear(channels, out_features, bias)

    @override
    def forward(self, features: Tensor) -> Tensor:
        if features.shape[-1] % self.mix.in_features:
            raise ValueError(
                f"`PooledLinear` needs the flattened pixels of {self.mix.in_features} channels. Found "
                f"{features.shape[-1]} features. Flatten images of shape (batch, channels, height, width) from "
                "dimension 1 on."
            )
        mixed: Tensor = self.mix(features.reshape(*features.shape[:-1], self.mix.in_features, -1).mean(-1))
        return mixed


def convolutionalize(module: _Module, example_input: Any) -> _Module:
    r"""Return a copy whose linear layers on flattened images take the mean over the image instead.

    A layer on :math:`C \times H \times W` features has :math:`C H W` weights an output; after it, :math:`C`:
    the sums over the image of the former ones, so that outputs are the same wherever a feature map is constant, and
    training can go on from there. Images may have other sizes afterwards. Lin, Chen and Yan, "Network In Network",
    2014 (https://arxiv.org/abs/1312.4400).

    Args:
        module: Left as it is.
        example_input: What its ``forward`` takes, a tuple for several.

    Returns:
        The copy, with ``PooledLinear`` for each linear layer that reads a flattened image of several pixels.

    Raises:
        ValueError: If there is none, or one reads images of several shapes.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
        >>> small = convolutionalize(net, torch.zeros(1, 1, 28, 28))
        >>> sum(p.numel() for p in net.parameters()), sum(p.numel() for p in small.parameters())
        (27090, 90)
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    with undisturbed(module), torch.no_grad(), _Following() as found:
        module(*inputs)
    twin = copy.deepcopy(module)
    count = 0
    for name, layer in module.named_modules():
        shapes = found.shapes.get(id(getattr(layer, "weight", None)), set())
        if isinstance(layer, nn.Linear) and any(shape[1:].numel() > 1 for shape in shapes):
            _replace(twin, name, _pooled(name, layer, shapes))
            count += 1
    if not count:
        raise ValueError(
            "`convolutionalize` needs a linear layer that reads a flattened image, (batch, channels, height, width) to "
            f"(batch, features). Found none in `{type(module).__name__}`. Nothing is to be gained where a net pools to "
            "one pixel, or has no convolutions."
        )
    return twin


class _Following(TorchFunctionMode):
    """Notes the shape of the image, without the batch, that each weight of a linear layer reads flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, set[torch.Size]] = {}
        self._images: dict[int, tuple[Tensor, torch.Size]] = {}  # the tensor too, so that its id isn't reused

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if not (isinstance(source, Tensor) and isinstance(output, Tensor)):
            return output
        known = self._images.get(id(source))
        if func is _LINEAR:
            if known is not None:
                self.shapes.setdefault(id(args[1]), set()).add(known[1])
        elif source.ndim == 4 and output.shape == (len(source), source[0].numel()):
            self._images[id(output)] = (output, source.shape[1:])
        elif known is not None and output.shape == source.shape:  # dropout, activations
            self._images[id(output)] = (output, known[1])
        return output


def _pooled(name: str, layer: nn.Linear, shapes: set[torch.Size]) -> PooledLinear:
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"A linear layer must read images of one number of channels. Found `{name}` with {sorted(shapes)}. Use two "
            "layers."
        )
    channels = next(iter(shapes))[0]
    pooled = PooledLinear(channels, layer.out_features, layer.bias is not None)
    pooled = pooled.to(layer.weight.device, layer.weight.dtype)
    with torch.no_grad():
        pooled.mix.weight.copy_(layer.weight.reshape(layer.out_features, channels, -1).sum(-1))
        if layer.bias is not None:
            pooled.mix.bias.copy_(layer.bias)
    return pooled


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, part)
