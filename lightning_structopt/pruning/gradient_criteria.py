"""Criteria that need first gradients: those of training, which are there anyway, or of a calibration set."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice
from lightning_structopt._precision import widened
from lightning_structopt._undisturbed import trainable, undisturbed
from lightning_structopt.pruning.calibration import Calibration, require_calibration_type, require_unsharded
from lightning_structopt.pruning.criteria import NOTHING, Criterion, Evidence, Scores
from lightning_structopt.pruning.sharding import Sharding


class GradientCriterion(Criterion):
    """A criterion that adds something up over the gradients of a loss.

    In training it takes the gradients of every optimizer step as they are then: averaged over accumulated
    batches and over ranks, unscaled, not clipped. With a ``calibration`` it runs that instead, and collects
    nothing while training.
    """

    calibration: Calibration | None = None
    """Batches whose gradients to take instead of those of training."""

    starts_anew: ClassVar[bool] = True
    """Whether totals start at zero after a step of the ramp, or run on from the start of training."""

    @abstractmethod
    def accumulate(self, total: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Add what one step contributes to ``total``, in place.

        Args:
            total: The sum so far, of the parameter's shape and in at least float32.
            weight: The weight before the step, of the type of ``total``; not modified.
            gradient: Its gradient, likewise.
        """

    def importance(self, weight: Tensor, total: Tensor, steps: int) -> Tensor:
        """Return the score of ``weight``, by default the mean contribution of a step."""
        return total / steps

    @override
    def require(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        if self.calibration is not None:
            require_unsharded(self, Sharding.of(parameters))

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        if self.calibration is not None:
            evidence = self._run(self.calibration, weights, evidence)
        self._require_gradients(weights, evidence)
        return Scores({
            name: self.importance(widened(weight), evidence.totals[name], evidence.steps[name])
            for name, weight in weights.items()
        })

    def _run(self, calibration: Calibration, weights: Mapping[str, Tensor], evidence: Evidence) -> Evidence:
        require_unsharded(self, evidence.sharding)
        module = evidence.root()
        parameters = [evidence.parameter(name) for name in weights]
        steps = 0
        with undisturbed(module), trainable(parameters):
            wide = {name: widened(weight) for name, weight in weights.items()}
            totals = {name: torch.zeros_like(weight) for name, weight in wide.items()}
            for loss in calibration.losses(module):
                # Not `backward`, which would add to the gradients of all parameters and wake DDP's hooks.
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                with torch.no_grad():
                    for name, gradient in zip(wide, gradients, strict=True):
                        self.accumulate(totals[name], wide[name], widened(gradient))
                steps += 1
        everywhere = evidence.count_over_ranks(steps)
        totals = {name: evidence.sum_over_ranks(total) for name, total in totals.items()}
        return replace(evidence, totals=totals, steps=dict.fromkeys(weights, everywhere))

    def _require_gradients(self, weights: Mapping[str, Tensor], evidence: Evidence) -> None:
        missing = [name for name in weights if not evidence.steps.get(name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(
                f"`{type(self).__name__}` needs gradients of every weight it scores. Found none of "
                f"`{missing[0]}`{more}. Use it in `IterativePruning` with a window that begins after the first "
                "optimizer step, or give a `calibration` to criteria that take one. A weight that is not trained "
                "belongs in `exclude`."
            )


@dataclass(frozen=True)
class Taylor(GradientCriterion):
    r"""The change of the loss without the weight, to first order, :math:`\mathbb{E}\,|w \, \partial L / \partial w|^p`.

    The mean is over the optimizer steps since the last step of the ramp, or over calibration batches. With
    one batch and ``p=1`` this is also the score of SNIP.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017), and
    "Importance Estimation for Neural Network Pruning" (2019), which squares; Lee et al., "SNIP" (2019).

    Args:
        p: 1 or 2.
        calibration: Batches to take gradients of; by default those of training are taken. Without a trainer,
            as in :func:`~lightning_structopt.prune`, it must be given.

    Raises:
        TypeError: If ``calibration`` is not a ``Calibration``.
        ValueError: If ``p`` is neither 1 nor 2; when scoring, if there are no gradients.

    Example:
        >>> from lightning_structopt.pruning import prune
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> masks = prune(nn.Linear(4, 3), 0.5, criterion=Taylor(calibration=Calibration(data)))
    """

    p: int = 1
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        require_choice("p", self.p, (1, 2))
        require_calibration_type(self.calibration)

    @override
    def accumulate(self, total: Tensor, weight: Tensor, gradient: Tensor) -> None:
        change = weight * gradient
        if self.p == 1:
            total.add_(change.abs_())
        else:
            total.addcmul_(change, change)


@dataclass(frozen=True)
class GradientSquared(GradientCriterion):
    r"""The weight against the mean square of its gradient, :math:`w^2 \, \mathbb{E} (\partial L / \partial w)^2`.

    The mean is over the optimizer steps since the last step of the ramp, or over calibration batches.
    Accumulated around a trained model this is the diagonal Fisher approximation of the change of the loss
    (twice that, which ranks alike; exact for batches of one sample); with one batch at initialization, SNIP's
    score squared.

    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning" (2018); Lee et al., "SNIP:
    Single-shot Network Pruning based on Connection Sensitivity" (2019).

    Args:
        calibration: Batches to take gradients of; by default those of training are taken. Without a trainer,
            as in :func:`~lightning_structopt.prune`, it must be given.

    Raises:
        TypeError: If ``calibration`` is not a ``Calibration``.
        ValueError: When scoring, if there are no gradients.

    Example:
        >>> from lightning_structopt.pruning import prune
        >>> data = [(torch.randn(8, 4), torch.randint(3, (8,)))]
        >>> masks = prune(nn.Linear(4, 3), 0.5, criterion=GradientSquared(Calibration(data)))
    """

    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        require_calibration_type(self.calibration)

    @override
    def accumulate(self, total: Tensor, weight: Tensor, gradient: Tensor) -> None:
        total.addcmul_(gradient, gradient)

    @override
    def importance(self, weight: Tensor, total: Tensor, steps: int) -> Tensor:
        return weight.square() * (total / steps)


@dataclass(frozen=True)
class Movement(GradientCriterion):
    r"""How far training moves the weight away from zero, :math:`-\sum_t w_t \, \partial L / \partial w_t`.

    The sum runs over all optimizer steps since training began. Weights that shrink score below zero and go
    first, whatever their size, which suits fine-tuning a pretrained model. It is a property of training, so
    there is nothing to calibrate, and :func:`~lightning_structopt.prune` can't use it.

    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), without its straight-through
    revival: what is pruned stays pruned.

    Raises:
        ValueError: When scoring, if there are no gradients.

    Example:
        >>> weights = {"weight": torch.tensor([[2.0, -1.0]])}
        >>> total = torch.zeros(1, 2)
        >>> Movement().accumulate(total, weights["weight"], torch.tensor([[1.0, 1.0]]))
        >>> Movement().score(weights, Evidence(totals={"weight": total}, steps={"weight": 1})).values["weight"]
        tensor([[-2.,  1.]])
    """

    starts_anew: ClassVar[bool] = False

    @override
    def accumulate(self, total: Tensor, weight: Tensor, gradient: Tensor) -> None:
        total.addcmul_(weight, gradient, value=-1)

    @override
    def importance(self, weight: Tensor, total: Tensor, steps: int) -> Tensor:
        return total
