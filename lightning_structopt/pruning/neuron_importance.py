"""How much the outputs of a module change with each of its neurons."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt._undisturbed import plain_attention, undisturbed
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.jacobian import (
    check_probes,
    outputs_of,
    probes_for,
    require_samples,
    sum_of_squares,
)

_ROWS_OF_FEATURES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_FEATURE_MAPS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def neuron_importance(
    module: nn.Module,
    layer: str,
    inputs: Tensor | Iterable[Any],
    *,
    probes: int | None = None,
    seed: int = 0,
    dim: int | None = None,
) -> Tensor:
    r"""Measure how much each neuron moves the outputs, :math:`\mathbb{E} \sum_j (\partial y_j / \partial x_i)^2`.

    :math:`x` are the outputs of ``layer`` and :math:`y` those of ``module``; the mean is over samples. This is
    the variance that unit noise on the neuron causes in the outputs, to first order. A channel of a feature
    map is one neuron, and so is a feature of a sequence: the squares are summed over positions.

    With few outputs the Jacobian is computed exactly, a backward pass for each output and batch, several at
    once through :func:`torch.func.vmap`. With many it is probed by Hutchinson's method,
    :math:`\mathbb{E}_v (v^\top J)_i^2` with random signs :math:`v`.

    Args:
        module: Takes a batch of inputs and returns a tensor, samples along dimension 0 of both. It runs in
            evaluation mode, so samples don't affect each other, and is left as it was.
        layer: The name of a submodule, as in ``module.named_modules()``; it must run once in a pass.
        inputs: A tensor (samples, ...), or batches: tensors, or tuples that begin with one, as of a loader.
        probes: Random vectors a sample. By default the sum is exact up to 256 outputs a sample; for more it
            takes 256 probes, with a relative error of ``(2 / probes) ** 0.5`` at most.
        seed: Seed of the probes, at least 0.
        dim: The dimension of neurons in the layer's output. By default the last one for linear layers and
            layer norms; 1 for convolutions, batch norms, outputs of two dimensions and of four or more.

    Returns:
        One number for each neuron: (neurons,), in at least float32.

    Raises:
        TypeError: If an argument, or what a module returns, is of the wrong kind.
        ValueError: If there is no such layer, it does not run exactly once, samples are not along dimension
            0, or ``dim`` is needed.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, bias=False))
        >>> weight = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        >>> _ = net[1].load_state_dict({"weight": weight})
        >>> neuron_importance(net, "0", torch.randn(5, 2))
        tensor([5., 9.])
    """
    check_probes(probes, seed)
    part = _find(module, layer)
    batches = Calibration(inputs).inputs(module)
    generator = torch.Generator().manual_seed(seed)
    total, samples = None, 0
    with undisturbed(module), plain_attention():
        for batch in batches:
            with _watched(part, layer) as passes:
                outputs = outputs_of(module, batch)
            (neurons,) = _run_once(passes, layer)
            require_samples(f"the output of `{layer}`", neurons, len(batch))
            (squares,) = sum_of_squares(outputs, [neurons], probes_for(outputs, probes), generator)
            axis = _neuron_dim(part, layer, neurons, dim)
            squares = squares.movedim(axis, 0).flatten(1).sum(1)
            total = squares if total is None else total + squares
            samples += len(batch)
    assert total is not None
    return total / samples


def _find(module: nn.Module, layer: str) -> nn.Module:
    try:
        return module.get_submodule(layer)
    except AttributeError:
        names = [name for name, _ in module.named_modules() if name]
        raise ValueError(f"`layer` must be one of {names}. Found `layer = {layer!r}`.") from None


@contextmanager
def _watched(part: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Make each output of ``part`` a start of its own, which the outputs of the module can be traced back to."""
    starts: list[Tensor] = []

    def restart(part: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"`{layer}` must return a tensor. Found a `{type(output).__name__}`. Name a module within it or "
                "behind it."
            )
        starts.append(output.detach().requires_grad_(True))
        return starts[-1].clone()  # what comes next may work in place

    handle = part.register_forward_hook(restart)
    try:
        yield starts
    finally:
        handle.remove()


def _run_once(passes: list[Tensor], layer: str) -> list[Tensor]:
    if len(passes) != 1:
        raise ValueError(
            f"`{layer}` must run once in a pass of the module. Found that it ran {len(passes)} times. Name a "
            "module that does, such as the one behind it."
        )
    return passes


def _neuron_dim(part: nn.Module, layer: str, output: Tensor, dim: int | None) -> int:
    if dim is not None:
        return dim
    if isinstance(part, _ROWS_OF_FEATURES):
        return -1
    if isinstance(part, _FEATURE_MAPS) or output.dim() != 3:
        return 1
    raise ValueError(
        f"Neurons may lie along dimension 1 or 2 of the output of `{layer}`, a `{type(part).__name__}`. Found the "
        f"shape {tuple(output.shape)}. Give `dim`."
    )
