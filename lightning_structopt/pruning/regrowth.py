"""Regrowth: dead weights come back while as many others die, so that the network looks for its own wiring."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt._dtensors import local
from lightning_structopt._horizon import steps_taken, training_horizon
from lightning_structopt.pruning.criteria import Scores
from lightning_structopt.pruning.evidence import all_finite, dense
from lightning_structopt.pruning.lowest import Count, Masks, drop_lowest
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.patterns import Pattern, Unstructured
from lightning_structopt.pruning.ramps import OneShotRamp, Ramp
from lightning_structopt.pruning.rewinding import Rewind
from lightning_structopt.pruning.sharding import WHOLE, Sharding


class Regrow(ABC):
    """A rule for how many weights of a layer are exchanged, and when."""

    every: int
    """Optimizer steps between two exchanges."""
    until: float
    """Where they end, as a fraction of the whole training."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """Return the fraction of a layer's alive weights that is exchanged.

        Args:
            progress: How much of the time until ``until`` has passed, in [0, 1).
        """


@dataclass(frozen=True)
class RigL(Regrow):
    r"""The smallest weights are dropped and those with the largest gradients grown, at constant sparsity.

    Every ``every`` optimizer steps, in each layer, :math:`k = \frac{\alpha}{2} (1 + \cos \frac{\pi t}{T})\,n` of
    its :math:`n` alive weights with the smallest :math:`|w|` die, and :math:`k` of its dead weights with the
    largest :math:`|\partial L / \partial w|` come alive: at zero, with empty optimizer state, to move in the very
    step that is about to be taken. (The paper skips that step.) What has just died is not grown. Among equals
    the one of lower index is dropped first and grown last.

    Gradients are those of the step: accumulated, averaged over ranks, unscaled, not clipped. A step with a
    gradient that is not finite is passed over, and the exchange waits for the next.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners" (2020), where the first mask is random and
    layers share sparsity by ERK: ``criterion=Random(seed=0)``, ``pattern=Unstructured("layer", ErdosRenyi())``.

    Args:
        fraction: :math:`\alpha`, the fraction of the alive weights that is exchanged at first, in (0, 1).
        every: Optimizer steps between two exchanges, at least 1. Under manual optimization a step is a training
            batch (with ``max_steps``: an optimizer step).
        until: :math:`T` as a fraction of the whole training, in (0, 1]: from there on the mask stays.

    Raises:
        TypeError: If ``every`` is not a whole number.
        ValueError: If an argument is out of range. In ``fit``, before the first step: if no exchange falls in
            the training.

    Example:
        >>> [round(RigL(fraction=0.4).share(progress), 3) for progress in (0.0, 0.5, 0.75)]
        [0.4, 0.2, 0.059]
    """

    fraction: float = 0.3
    every: int = 100
    until: float = 0.75

    def __post_init__(self) -> None:
        require_in("fraction", self.fraction, 0, 1, closed="neither")
        require_whole("every", self.every, 1)
        require_in("until", self.until, 0, 1, closed="right")

    @override
    def share(self, progress: float) -> float:
        return self.fraction / 2 * (1 + math.cos(math.pi * progress))


def require_constant_sparsity(begin: float, ramp: Ramp, pattern: Pattern, rewind: Rewind | None) -> None:
    """Raise if what comes with regrowth does not leave the sparsity as it is drawn at the start.

    Raises:
        ValueError: If it doesn't.
    """
    if begin != 0 or ramp != OneShotRamp():
        raise ValueError(
            "With `regrow` the mask is drawn at the start and sparsity is constant. Found "
            f"`begin = {begin}` and `ramp = {ramp!r}`. Leave both out."
        )
    if not isinstance(pattern, Unstructured):
        raise ValueError(
            f"`regrow` exchanges single weights, which `Unstructured` allows. Found `pattern = {pattern!r}`. Use "
            '`Unstructured("layer", ErdosRenyi())`, or leave `regrow` out.'
        )
    if rewind is not None:
        raise ValueError(
            f"With `regrow` there are no rounds to rewind. Found `rewind = {rewind!r}`. Give one of the two."
        )


def exchange(
    weights: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    share: float,
    sharding: Sharding = WHOLE,
) -> tuple[Masks, Masks]:
    """Choose which weights of each layer die and which come alive.

    Args:
        weights: The weights by parameter name; of a sharded one, this rank's part.
        gradients: Their gradients, likewise, those of dead weights too.
        keep: The masks so far; True where a weight is alive.
        share: The fraction of a layer's alive weights to exchange, in [0, 1]; at most as many as are dead.
        sharding: How the weights are spread over ranks.

    Returns:
        Masks of what stays alive and masks of what comes alive, as many as died.

    Example:
        >>> weights, gradients = {"w": torch.tensor([3.0, -1.0, 0.0, 0.0])}, {"w": torch.tensor([9.0, 9.0, 1.0, -2.0])}
        >>> stays, comes = exchange(weights, gradients, {"w": torch.tensor([True, True, False, False])}, 0.5)
        >>> stays["w"], comes["w"]
        (tensor([ True, False, False, False]), tensor([False, False, False,  True]))
    """
    stays: Masks = {}
    comes: Masks = {}
    for name, mask in keep.items():
        alive, total = _count(name, mask, sharding)
        k = min(round(share * alive), total - alive)
        if k == 0:
            stays[name], comes[name] = mask, torch.zeros_like(mask)
            continue
        stays |= drop_lowest(Scores(weights, power=1), {name: mask}, _constant(total - alive + k), sharding)
        # Of the dead, all but the k with the largest gradients are left out.
        steepness = Scores({name: gradients[name].abs()})
        comes |= drop_lowest(steepness, {name: ~mask}, _constant(total - k), sharding)
    return stays, comes


def _count(name: str, mask: Tensor, sharding: Sharding) -> tuple[int, int]:
    """Return how many weights of a layer are alive and how many there are, on all ranks."""
    counts = sharding.counts(name)
    return sharding.total([int(mask.count_nonzero())] * counts), sharding.total([mask.numel()] * counts)


def _empty_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, where: Tensor) -> None:
    for value in optimizer.state.get(parameter, {}).values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            local(value).masked_fill_(where, 0)


def _constant(count: int) -> Count:
    return lambda total: count


class Regrower:
    """Exchanges weights of one training when their time has come.

    Layers are exchanged when their own optimizer steps, as that is when their gradients are complete.

    Args:
        rule: How many, and when.
        masks: What to exchange. The number of weights that are alive in a layer never changes.
    """

    def __init__(self, rule: Regrow, masks: MaskSet) -> None:
        self.rule = rule
        self.masks = masks
        self._end = 0.0
        self._first = 0
        self._done: dict[str, int] = {}  # by parameter, the moment of its latest exchange

    def lay(self, trainer: Any) -> None:
        """Lay the exchanges over the training of ``trainer``, which is about to start.

        Raises:
            ValueError: If that training has no length or no exchange falls in it.
        """
        rule, total, now = self.rule, training_horizon(trainer).steps, steps_taken(trainer)
        if math.isinf(total):
            raise ValueError(
                "Regrowth needs the length of training in steps. Found a loader without a length. Give the trainer "
                "`max_steps` or `limit_train_batches`."
            )
        self._end, self._first = rule.until * total, 0 if trainer.fast_dev_run else rule.every
        if self._first >= self._end:
            raise ValueError(
                f"Regrowth must exchange weights at least once. Found `{rule!r}` in a training of {total:g} steps. "
                "Give a smaller `every`, or train for longer."
            )
        # Of a training before this one, with the same callback, nothing is done yet in this one.
        self._done = {name: moment for name, moment in self._done.items() if moment <= now}

    def reached(self, now: int) -> int | None:
        """Return the latest moment of an exchange that is not after ``now``, or None."""
        if now < self._first:
            return None
        last = math.ceil(self._end) - 1
        return min(now, last) // self.rule.every * self.rule.every

    @torch.no_grad()
    def due(self, now: int, parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """Return the gradients, by name, of those layers among ``parameters`` that are to be exchanged.

        All ranks call it together before an optimizer step; they get the same layers, each with its part.
        """
        moment = self.reached(now)
        if moment is None or not self.masks.pruned:  # a criterion may still wait for all it wants to see
            return {}
        stepped = {id(parameter) for parameter in parameters}
        waiting = [name for name in self.masks.parameters if self._done.get(name, -1) < moment]
        names = [name for name in waiting if id(self.masks.parameters[name]) in stepped]
        found = {name: self.masks.parameters[name].grad for name in names}
        gradients = {name: dense(gradient) for name, gradient in found.items() if gradient is not None}
        # A rank that holds a part alone sees what is wrong in it; a layer takes part on every rank or on none.
        usable = [int(name in gradients and all_finite([gradients[name]])) for name in names]
        everywhere = (
            [all(flags) for flags in zip(*self.masks.sharding.gather(usable), strict=True)] if names else []
        )
        return {name: gradients[name] for name, ready in zip(names, everywhere, strict=True) if ready}

    @torch.no_grad()
    def exchange(
        self, now: int, gradients: Mapping[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Exchange weights of the layers of ``gradients``, and let ``optimizers`` start anew on those that come.

        Args:
            now: How far training has come.
            gradients: What :meth:`due` returned.
            optimizers: Whatever remembers something of the weights.
        """
        moment = self.reached(now)
        assert moment is not None, "nothing is due"
        masks, weights = self.masks.masks(), self.masks.weights()
        share = self.rule.share(moment / self._end)
        mine = {name: masks[name] for name in gradients}
        stays, comes = exchange(weights, gradients, mine, share, self.masks.sharding)
        self._done |= dict.fromkeys(gradients, moment)
        self.masks.update(masks | {name: stays[name] | comes[name] for name in gradients})
        for name, grown in comes.items():
            for optimizer in optimizers:
                _empty_state(optimizer, self.masks.parameters[name], grown)

    def state_dict(self) -> dict[str, int]:
        """Return what has been done as plain data."""
        return dict(self._done)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._done = dict(state)
