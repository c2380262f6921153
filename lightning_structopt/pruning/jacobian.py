"""The criterion that asks how much the outputs of a module change, and the sums of squares behind it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt._precision import widened
from lightning_structopt._undisturbed import plain_attention, trainable, undisturbed
from lightning_structopt.pruning.calibration import (
    Calibration,
    require_calibration,
    require_calibration_type,
    require_unsharded,
)
from lightning_structopt.pruning.criteria import NOTHING, Criterion, Evidence, Scores
from lightning_structopt.pruning.curvature import random_signs
from lightning_structopt.pruning.sharding import Sharding

_EXACT_UP_TO = 256  # outputs of a sample; for more, as many probes cost less and are off by at most 9%
_ELEMENTS = 2**24  # of gradients that are held at once: 64 MiB in float32


@dataclass(frozen=True)
class JacobianImportance(Criterion):
    r"""How much the outputs change without the weight, :math:`\mathbb{E} \sum_j (w \, \partial y_j / \partial w)^2`.

    The mean is over samples, the change to first order. Unlike gradients of a loss it doesn't vanish when the
    model fits its data, and it needs no labels. :func:`~lightning_structopt.neuron_importance` is the same for
    neurons.

    With few outputs the Jacobian is computed exactly, sample by sample, a backward pass for each output and
    several at once through :func:`torch.func.vmap`. With many it is probed by Hutchinson's method,
    :math:`\mathbb{E}_v (v^\top J)_i^2` with random signs :math:`v` over a whole batch.

    Args:
        calibration: Batches of inputs; without it, scoring is an error. Needs no loss.
        probes: Random vectors a batch, at least 1. By default the sum is exact up to 256 outputs a sample;
            for more it takes 256 probes a batch.
        seed: Seed of the probes, at least 0.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range; when scoring, if there is no ``calibration``, samples are not along
            dimension 0, or parameters are sharded (FSDP2).

    Example:
        >>> from lightning_structopt.pruning import prune
        >>> criterion = JacobianImportance(Calibration(torch.randn(8, 4)))
        >>> masks = prune(nn.Linear(4, 3), 0.5, criterion=criterion)
    """

    calibration: Calibration | None = None
    probes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_calibration_type(self.calibration)
        check_probes(self.probes, self.seed)

    @override
    def require(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        require_calibration(self, self.calibration)
        require_unsharded(self, Sharding.of(parameters))

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        calibration = require_calibration(self, self.calibration)
        require_unsharded(self, evidence.sharding)
        module = evidence.root()
        parameters = [evidence.parameter(name) for name in weights]
        generator = torch.Generator().manual_seed(self.seed)
        samples = 0
        with undisturbed(module), plain_attention(), trainable(parameters):
            totals = [torch.zeros_like(widened(weight)) for weight in weights.values()]
            for batch in calibration.inputs(module):
                for outputs, probes in self._passes(module, batch):
                    squares = sum_of_squares(outputs, parameters, probes, generator)
                    torch._foreach_add_(totals, squares)
                samples += len(batch)
        samples = evidence.count_over_ranks(samples)
        means = [evidence.sum_over_ranks(total) / samples for total in totals]
        return Scores({
            name: widened(weight).square() * mean
            for (name, weight), mean in zip(weights.items(), means, strict=True)
        })

    def _passes(self, module: nn.Module, batch: Tensor) -> Iterator[tuple[Tensor, int | None]]:
        """Yield outputs to differentiate: of single samples, whose gradients must not mix, or of all at once.

        Probes may span a batch, as random signs of different samples cancel in the mean.
        """
        outputs = outputs_of(module, batch)
        probes = probes_for(outputs, self.probes)
        if probes is None:
            for sample in batch.split(1):  # type: ignore[no-untyped-call]
                yield outputs_of(module, sample), None
        else:
            yield outputs, probes


def sum_of_squares(
    outputs: Tensor, sources: Sequence[Tensor], probes: int | None, generator: torch.Generator
) -> list[Tensor]:
    """Return for each of ``sources`` the sum over outputs of its squared derivatives.

    Args:
        outputs: (samples, ...). With several samples and no probes, each source must have samples too.
        sources: What the outputs were computed from.
        probes: Estimate the sum with so many random vectors; None for all unit vectors.
        generator: Source of the random vectors.
    """
    rows = outputs.flatten(1) if outputs.dim() > 1 else outputs.unsqueeze(1)
    count = rows.shape[1] if probes is None else probes
    largest = max(rows.numel(), sum(source.numel() for source in sources))
    chunk = max(1, _ELEMENTS // max(1, largest))
    totals = [torch.zeros_like(widened(source.detach())) for source in sources]
    if not rows.requires_grad:  # nothing on the way to the outputs
        return totals

    def backward(vector: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            rows, sources, vector, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    for first in range(0, count, chunk):
        size = min(chunk, count - first)
        vectors = (
            _units(first, size, rows)
            if probes is None
            else random_signs((size, *rows.shape), rows, generator)
        )
        with warnings.catch_warnings():
            # Operators that vmap has no rule for run one by one, as they would without it.
            warnings.filterwarnings("ignore", ".*performance drop.*batching rule")
            gradients = torch.func.vmap(backward)(vectors)
        for total, gradient in zip(totals, gradients, strict=True):
            total += widened(gradient).square().sum(0)
    return totals if probes is None else [total / probes for total in totals]


def _units(first: int, size: int, rows: Tensor) -> Tensor:
    """Return vectors that pick one output each, of all samples at once."""
    outputs = torch.arange(first, first + size, device=rows.device)
    picks = nn.functional.one_hot(outputs, rows.shape[1]).to(rows.dtype)
    return picks.unsqueeze(1).expand(size, *rows.shape)


def probes_for(outputs: Tensor, probes: int | None) -> int | None:
    """Return how many probes to take, None for the exact sum."""
    few = outputs[:1].numel() <= _EXACT_UP_TO
    return probes if probes is not None else None if few else _EXACT_UP_TO


def check_probes(probes: int | None, seed: int) -> None:
    """Raise unless ``probes`` is None or at least 1, and ``seed`` at least 0."""
    if probes is not None:
        require_whole("probes", probes, 1)
    require_whole("seed", seed, 0)


def outputs_of(module: nn.Module, batch: Tensor) -> Tensor:
    """Run ``module`` on ``batch``.

    Raises:
        TypeError: If it does not return a tensor.
        ValueError: If it returns a different number of samples, or outputs that depend on nothing.
    """
    outputs = module(batch)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"The module must return a tensor. Found a `{type(outputs).__name__}`. Wrap it in a module that "
            "returns the outputs that matter."
        )
    require_samples("the module's output", outputs, len(batch))
    return outputs


def require_samples(what: str, tensor: Tensor, samples: int) -> None:
    """Raise unless dimension 0 of ``tensor`` is as long as there are ``samples``.

    Raises:
        ValueError: If it is not.
    """
    if tensor.dim() == 0 or len(tensor) != samples:
        raise ValueError(
            f"Samples must be along dimension 0. Found {what} of shape {tuple(tensor.shape)} for {samples} "
            "samples. Wrap the module in one that takes and returns samples first."
        )
