"""How long a training run will be and how far it has come, in epochs and in optimizer steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Horizon:
    """The planned length of a training run; ``math.inf`` where nothing bounds it.

    Args:
        epochs: Epochs until training stops; a fraction where ``max_steps`` ends it in the middle of one.
        steps: Optimizer steps until training stops. Under manual optimization, where only the module knows
            how often its optimizers step: ``max_steps`` if given, training batches if not.
    """

    epochs: float
    steps: float


def training_horizon(trainer: Any) -> Horizon:
    """Work out the horizon of ``trainer``; call it in ``on_train_start`` or later.

    ``Trainer.estimated_stepping_batches`` would do, but it loads the data when asked too early, after which
    Lightning no longer restores the state of a stateful loader, and it is wrong under
    ``GradientAccumulationScheduler``.

    Args:
        trainer: A ``lightning.pytorch.Trainer`` whose training data is set up.
    """
    max_epochs = _epochs_trained(trainer)
    if _counts_own_steps(trainer):
        return Horizon(max_epochs, trainer.max_steps)
    max_steps = math.inf if trainer.max_steps == -1 else trainer.max_steps
    steps_before = _steps_before_epoch(trainer)
    if steps_before(max_epochs) <= max_steps:
        return Horizon(max_epochs, steps_before(max_epochs))
    return Horizon(min(max_epochs, _epochs_for(max_steps, steps_before)), max_steps)


def steps_taken(trainer: Any) -> int:
    """Return how far training has come, in the unit of :attr:`Horizon.steps`, at the start of a batch.

    Args:
        trainer: A ``lightning.pytorch.Trainer`` in ``on_train_batch_start``.
    """
    if trainer.lightning_module.automatic_optimization or _counts_own_steps(trainer):
        return int(trainer.global_step)
    return int(trainer.fit_loop.total_batch_idx)


def training_position(trainer: Any) -> Horizon:
    """Return how far training has come at the start of a batch, in the units of its :class:`Horizon`.

    Args:
        trainer: A ``lightning.pytorch.Trainer`` in ``on_train_batch_start``.
    """
    return Horizon(trainer.current_epoch, steps_taken(trainer))


def _epochs_trained(trainer: Any) -> float:
    """Return in how many epochs weights are trained."""
    # StochasticWeightAveraging adds one, in which batch norms look at data and nothing is trained.
    averaged = [callback.swa_end + 1 for callback in trainer.callbacks if hasattr(callback, "swa_end")]
    epochs = averaged[0] if averaged else trainer.max_epochs
    return math.inf if epochs in {None, -1} else epochs


def _counts_own_steps(trainer: Any) -> bool:
    """Tell whether a manually optimized module is stopped by ``max_steps``, which sums all its optimizers."""
    return not trainer.lightning_module.automatic_optimization and trainer.max_steps != -1


def _steps_before_epoch(trainer: Any) -> Callable[[float], float]:
    """Return the function from an epoch to the number of optimizer steps that come before it."""
    batches: float = trainer.num_training_batches
    automatic = trainer.lightning_module.automatic_optimization
    schedulers = [c for c in trainer.callbacks if hasattr(c, "get_accumulate_grad_batches")]

    def steps_in(epoch: int) -> float:
        accumulate = trainer.accumulate_grad_batches if automatic else 1
        if schedulers and automatic:
            accumulate = schedulers[0].get_accumulate_grad_batches(epoch)
        return batches if math.isinf(batches) else math.ceil(batches / accumulate)

    def steps_before(epochs: float) -> float:
        if not schedulers or math.isinf(epochs) or math.isinf(batches):
            return epochs * steps_in(0) if epochs else 0
        return sum(steps_in(epoch) for epoch in range(int(epochs)))

    return steps_before


def _epochs_for(steps: float, steps_before: Callable[[float], float]) -> float:
    """Return the (fractional) number of epochs that ``steps`` optimizer steps take."""
    if math.isinf(steps_before(1)):
        return math.inf
    epoch = 0
    while steps_before(epoch + 1) <= steps:
        epoch += 1
    within = steps - steps_before(epoch)
    return epoch + within / (steps_before(epoch + 1) - steps_before(epoch))
