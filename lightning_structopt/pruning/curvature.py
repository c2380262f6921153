"""The second-order criterion."""

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
from lightning_structopt.pruning.sharding import Sharding


@dataclass(frozen=True)
class HessianDiagonal(Criterion):
    r"""The change of the loss without the weight, to second order, :math:`w_i^2 H_{ii} / 2`.

    The gradient's part is left out, as at a minimum. The Hessian's diagonal is estimated by Hutchinson's
    method, :math:`H_{ii} = \mathbb{E}_z\, z_i (H z)_i` with random signs :math:`z`, averaged over probes and
    over calibration batches, at the cost of two backward passes each; where the Hessian is diagonal, one
    probe is exact. Away from a minimum curvature may be negative, and such weights go first.

    LeCun et al., "Optimal Brain Damage" (1990); Bekas et al., "An estimator for the diagonal of a matrix"
    (2007).

    Args:
        calibration: Batches and their loss; without it, scoring is an error.
        probes: Random vectors for each batch, at least 1. The error falls with the root of their number.
        seed: Seed of the probes, at least 0.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If one is out of range; when scoring, if there is no ``calibration`` or parameters are
            sharded (FSDP2).

    Example:
        >>> from lightning_structopt.pruning import prune
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> masks = prune(nn.Linear(4, 3), 0.5, criterion=HessianDiagonal(Calibration(data)))
    """

    calibration: Calibration | None = None
    probes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        require_calibration_type(self.calibration)
        require_whole("probes", self.probes, 1)
        require_whole("seed", self.seed, 0)

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
        count = 0
        with undisturbed(module), plain_attention(), trainable(parameters):
            totals = [torch.zeros_like(widened(weight)) for weight in weights.values()]
            for loss in calibration.losses(module):
                for diagonal in _estimates(loss, parameters, self.probes, generator):
                    torch._foreach_add_(totals, diagonal)
                    count += 1
        count = evidence.count_over_ranks(count)
        means = [evidence.sum_over_ranks(total) / count for total in totals]
        return Scores({
            name: widened(weight).square() * mean / 2
            for (name, weight), mean in zip(weights.items(), means, strict=True)
        })


def _estimates(
    loss: Tensor, parameters: Sequence[Tensor], probes: int, generator: torch.Generator
) -> Iterator[list[Tensor]]:
    """Yield one estimate of the Hessian's diagonal for each probe."""
    gradients = torch.autograd.grad(
        loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    for _ in range(probes):
        signs = [random_signs(parameter.shape, parameter, generator) for parameter in parameters]
        product = sum((g * z).sum() for g, z in zip(gradients, signs, strict=True))
        assert isinstance(product, Tensor)
        if not product.requires_grad:  # the loss is linear in the weights
            yield [torch.zeros_like(widened(parameter)) for parameter in parameters]
            continue
        rows = torch.autograd.grad(
            product, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        yield [widened(z * row) for z, row in zip(signs, rows, strict=True)]


def random_signs(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw -1 or 1 at even odds, on the CPU so that every device gets the same, of the type of ``like``."""
    return (torch.randint(2, tuple(shape), generator=generator) * 2 - 1).to(like)
