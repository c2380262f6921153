"""Growth that keeps the function (Chen et al., 2016), as plain functions."""

from typing import Any

from torch import nn

from lightning_structopt.growth.deepening import DeepenKind
from lightning_structopt.growth.steps import Deepen, Widen


def widen(
    module: nn.Module, name: str, factor: float, example_input: Any, noise: float = 0.0, *, seed: int = 0
) -> nn.Module:
    r"""Return a module with more channels, heads or neurons that computes the same.

    New channels copy old ones, and what reads a channel with :math:`m` copies is divided by :math:`m`:
    :math:`W'_{oj} = W_{oi} / m_i` for each copy :math:`j` of :math:`i`. What depends on each other grows together, as
    it shrinks together: rows, norms and their statistics, residual sums, concatenations, the columns that read them,
    attributes that hold sizes. Outputs are compared in evaluation and in training; where they differ by more than 1e-5
    of the largest, nothing is returned.

    What a layer, group or RMS norm reduces over grows if ``factor`` is whole, as all is then copied equally often.

    Args:
        module: The module; left as it is.
        name: Of a layer, whose outputs grow with all that they depend on; of a block (an attention, a residual block),
            in which all grows that is within it alone and can; ``""`` is the module itself.
        factor: How many times as many there shall be, above 1; the number is rounded.
        example_input: What its ``forward`` takes, a tuple for several. Its batch should be of at least 2.
        noise: Standard deviation of noise on the weights that read copies, relative to that of these weights. It adds
            up to zero over the copies of a channel, so that outputs are kept, and copies learn different things.
        seed: Of which channels are copied once more if ``factor`` is not whole, and of the noise.

    Returns:
        The wider module, of the same class.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there is no such part, it can't grow with the function kept, or the module can't be traced.

    Example:
        >>> import torch
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> widen(module, "0", 2.0, torch.randn(2, 4))[0]
        Linear(in_features=4, out_features=16, bias=True)

    See Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer" (2016), https://arxiv.org/abs/1511.05641.
    """
    return Widen(factor, name, noise, seed).apply(module, example_input)


def deepen(
    module: nn.Module,
    after: str,
    example_input: Any,
    *,
    kind: DeepenKind = "identity",
    kernel_size: int = 3,
    norm: bool = False,
    seed: int = 0,
) -> nn.Module:
    r"""Return a module with one more layer, or residual block, that computes the same.

    An identity layer fits next to an activation with :math:`\phi(\phi(x)) = \phi(x)`: ReLU, ReLU6, Hardtanh.
    After such an activation it is :math:`\phi(I x)`, before one :math:`I \phi(x)`. A residual block
    :math:`x + W_2 \max(0, W_1 x)` with :math:`W_2 = 0` fits anywhere. Both are exact in evaluation and training.

    The layer is appended if the place is a plain ``nn.Sequential``, so that no name changes; any other place becomes
    ``nn.Sequential(place, new)``, and its parameters are found under ``"place.0"``.

    Args:
        module: The module; left as it is.
        after: The part that the layer follows: a layer, an activation, a block.
        example_input: What its ``forward`` takes, a tuple for several.
        kind: ``"identity"`` or ``"residual"``.
        kernel_size: Of convolutions; odd.
        norm: Whether a residual block has batch norms, the last of them zero.
        seed: Of the weights :math:`W_1`.

    Returns:
        The deeper module, of the same class.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If there is no such part, or no layer there would keep the function.

    Example:
        >>> import torch
        >>> module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> deepen(module, "1", torch.randn(2, 4))[1]
        Sequential(
          (0): ReLU()
          (1): Sequential(
            (0): Linear(in_features=8, out_features=8, bias=True)
            (1): ReLU()
          )
        )

    See Chen et al., "Net2Net: Accelerating Learning via Knowledge Transfer" (2016), https://arxiv.org/abs/1511.05641.
    """
    return Deepen(after, kind, kernel_size, norm, seed).apply(module, example_input)
