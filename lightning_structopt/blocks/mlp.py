"""A perceptron with several layers."""

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt.blocks.activations import Activation, activation_module
from lightning_structopt.blocks.initialization import Initialization, Kaiming, initialize
from lightning_structopt.blocks.parts import Norm, norm_of_features, require_norm, require_widths


class MLP(nn.Module):
    """Dense layers, each with norm, activation and dropout, and a linear head.

    Args:
        in_features: Numbers in one sample, all dimensions but the first together.
        widths: Neurons of each hidden layer.
        classes: Outputs.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"mish"``, ``"hardswish"`` or a module class.
        norm: ``"batch"``, ``"layer"`` or None.
        dropout: Probability of dropping a hidden neuron, in [0, 1).
        initialization: How weights start, with a gain that fits the activation.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> MLP(784, (64, 32), 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        widths: Sequence[int],
        classes: int,
        *,
        activation: Activation = "relu",
        norm: Norm | None = None,
        dropout: float = 0.0,
        initialization: Initialization = Kaiming(),  # noqa: B008  # a frozen value
    ) -> None:
        super().__init__()
        require_whole("in_features", in_features, 1)
        require_whole("classes", classes, 1)
        require_norm(norm)
        require_in("dropout", dropout, 0, 1, closed="left")
        layers: list[nn.Module] = []
        last = in_features
        for width in require_widths(widths):
            # A bias before a norm would be taken out again.
            layers += [nn.Linear(last, width, bias=norm is None), *norm_of_features(norm, width)]
            layers += [activation_module(activation), *([nn.Dropout(dropout)] if dropout else [])]
            last = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(last, classes)
        initialize(self, initialization, activation=activation)

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden(inputs.flatten(1)))
        return logits
