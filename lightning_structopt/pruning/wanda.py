"""The criterion that weighs weights by their inputs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_structopt._precision import widened
from lightning_structopt._undisturbed import compiled_parts, undisturbed
from lightning_structopt.pruning.calibration import Calibration, require_calibration_type, require_unsharded
from lightning_structopt.pruning.criteria import NOTHING, Criterion, Evidence, Scores
from lightning_structopt.pruning.outputs import TRANSPOSED
from lightning_structopt.pruning.sharding import Sharding

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHOW_INPUTS = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS, *TRANSPOSED)
_KERNEL_GRADIENTS = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}

Sink = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Wanda(Criterion):
    r"""The weight times the norm of what it multiplies, :math:`|w_{ij}| \, \lVert x_j \rVert_2`.

    The norm runs over all samples and positions: since the last step of the ramp in training, or over
    calibration batches. In a convolution each place of the kernel has the norm of what it meets. Linear,
    bilinear and convolutional layers (transposed ones too, by input channel) can be scored; attention and
    recurrent layers don't show their inputs. The paper compares within each output's row; here the pattern
    says what is compared.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023).

    Args:
        calibration: Batches of inputs; by default those of training are taken. Without a trainer, as in
            :func:`~lightning_structopt.prune`, it must be given. Needs no loss.

    Raises:
        TypeError: If ``calibration`` is not a ``Calibration``.
        ValueError: When scoring, if no inputs were seen; before that, if a layer doesn't show them.

    Example:
        >>> from lightning_structopt.pruning import prune
        >>> masks = prune(nn.Linear(4, 3), 0.5, criterion=Wanda(Calibration(torch.randn(8, 4))))
    """

    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        require_calibration_type(self.calibration)

    @override
    def require(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        _layers(module, parameters)
        if self.calibration is not None:
            require_unsharded(self, Sharding.of(parameters))
        elif compiled := compiled_parts(module):
            raise ValueError(
                "`Wanda` watches inputs by forward hooks, which compiled code may leave out. Found that "
                f"`{compiled[0] or type(module).__name__}` is compiled by `torch.compile`. Give a `calibration`, "
                "which runs without, or take a criterion of gradients such as `Taylor()`."
            )

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        if self.calibration is not None:
            evidence = self._run(self.calibration, weights, evidence)
        missing = [name for name in weights if not evidence.steps.get(name)]
        if missing:
            raise ValueError(
                f"`Wanda` needs the inputs of every weight it scores. Found none of `{missing[0]}`. Use it in "
                "`IterativePruning` with a window that begins after the first optimizer step, or give a "
                "`calibration`. A layer that never runs belongs in `exclude`."
            )
        return Scores({name: self._score(name, weight, evidence) for name, weight in weights.items()})

    def _score(self, name: str, weight: Tensor, evidence: Evidence) -> Tensor:
        norms = evidence.totals[name].sqrt()
        shape = evidence.parameter(name).shape if name in evidence.sharding.sharded else weight.shape
        if len(norms) not in {1, shape[0]}:  # a convolution in groups: each has inputs of its own
            norms = norms.repeat_interleave(shape[0] // len(norms), 0)
        return widened(weight).abs() * evidence.part(name, norms.expand(shape))

    def _run(self, calibration: Calibration, weights: Mapping[str, Tensor], evidence: Evidence) -> Evidence:
        require_unsharded(self, evidence.sharding)
        module = evidence.root()
        totals: dict[str, Tensor] = {}

        def add(name: str, squares: Tensor) -> None:
            totals[name] = totals[name].add_(squares) if name in totals else squares

        handles = watch_inputs(module, {name: evidence.parameter(name) for name in weights}, add)
        try:
            with undisturbed(module):
                for inputs in calibration.inputs(module):
                    module(inputs)
        finally:
            remove(handles)
        # All ranks go through the same names, whichever layers ran where, and in whatever order.
        ranks = 1 if evidence.group is None else evidence.group.size()
        seen = {name: evidence.count_over_ranks(int(name in totals)) for name in weights}
        everywhere = {name: count for name, count in seen.items() if count == ranks}
        shared = {name: evidence.sum_over_ranks(totals[name]) for name in everywhere}
        return replace(evidence, totals=shared, steps=everywhere)


def watch_inputs(module: nn.Module, parameters: Mapping[str, Tensor], sink: Sink) -> list[RemovableHandle]:
    """Call ``sink`` with a name and the sums of squared inputs whenever a layer with that parameter runs.

    Only passes with gradients count, so validation does not.

    Args:
        module: Where the layers are.
        parameters: Their weights by name.
        sink: Takes a name and a tensor whose last dimensions broadcast over the weight; the first one is the
            weight's, or the number of the convolution's groups.

    Returns:
        Handles to end it with.

    Raises:
        ValueError: If a weight belongs to a layer of another kind.
    """
    return [
        layer.register_forward_pre_hook(partial(_observe, name=name, sink=sink), with_kwargs=True)
        for name, layer in _layers(module, parameters)
    ]


def remove(handles: Iterable[RemovableHandle]) -> None:
    """Take hooks off again."""
    for handle in handles:
        handle.remove()


def _observe(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, sink: Sink
) -> None:
    if torch.is_grad_enabled():
        inputs = [widened(value.detach()) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sink(name, squared_inputs(layer, inputs))


def squared_inputs(layer: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Return the sum of squares, over samples and positions, of what each weight of ``layer`` multiplies."""
    if isinstance(layer, _CONVOLUTIONS):
        return _squares_under_kernel(layer, inputs[0])
    if isinstance(layer, TRANSPOSED):
        places = len(layer.kernel_size)
        squares = inputs[0].square().flatten(-places).sum(-1)
        return squares.reshape(-1, layer.in_channels).sum(0).view(-1, *[1] * (places + 1))
    if isinstance(layer, nn.Bilinear):
        first, second = (each.reshape(-1, each.shape[-1]).square() for each in inputs)
        return (first.T @ second).unsqueeze(0)
    return inputs[0].reshape(-1, inputs[0].shape[-1]).square().sum(0, keepdim=True)


def _squares_under_kernel(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, inputs: Tensor) -> Tensor:
    """Return, by group, input channel and place in the kernel, the squares that come under that place."""
    places = len(layer.kernel_size)
    batched = inputs if inputs.dim() == places + 2 else inputs.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    summed = batched.square().sum(0, keepdim=True)  # first, as padding squares or sums is all the same
    squares = nn.functional.pad(summed, layer._reversed_padding_repeated_twice, mode=mode)
    outputs = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, dilation, kernel, stride in zip(
            squares.shape[2:], layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    # Each output position adds the patch under the kernel: the gradient of the kernel where that of all
    # outputs is 1.
    sums: Tensor = _KERNEL_GRADIENTS[places](  # type: ignore[no-untyped-call]
        squares,
        (1, layer.in_channels, *layer.kernel_size),
        squares.new_ones(1, 1, *outputs),
        stride=layer.stride,
        dilation=layer.dilation,
    )
    return sums.view(layer.groups, -1, *layer.kernel_size)


def _layers(module: nn.Module, parameters: Mapping[str, Tensor]) -> list[tuple[str, nn.Module]]:
    """Return every layer that has one of ``parameters`` as its weight, with the name of that.

    Raises:
        ValueError: If one belongs to a layer that does not show its inputs.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    # Attention reads the weight of this layer without calling it.
    bypassed = {id(part.out_proj) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
    layers: list[tuple[str, nn.Module]] = []
    hidden: list[tuple[str, nn.Module]] = []
    for layer in module.modules():
        shows = isinstance(layer, _SHOW_INPUTS) and id(layer) not in bypassed
        for leaf, parameter in layer._parameters.items():
            if id(parameter) in names:
                kind = layers if shows and leaf == "weight" else hidden
                kind.append((names[id(parameter)], layer))
    if hidden:
        wrong = list(dict.fromkeys(name for name, _ in hidden))
        raise ValueError(
            "`Wanda` needs layers that show their inputs: linear, bilinear or convolutional ones. Found "
            f"`{wrong[0]}` of a `{type(hidden[0][1]).__name__}`. Give `exclude = {wrong!r}`."
        )
    return layers
