"""Rewinding: after each pruning, training goes on from where it was early on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_structopt._checks import require_in
from lightning_structopt._dtensors import full, local, part_of
from lightning_structopt._horizon import Horizon
from lightning_structopt.pruning.clock import Clock


class Rewind(ABC):
    """A rule for what goes back in time after each step of the ramp."""

    to: float
    """Where to, as a fraction of the whole training."""


@dataclass(frozen=True)
class RewindWeights(Rewind):
    """Weights go back to what they were, pruned ones stay zero: iterative magnitude pruning with rewinding.

    Parameters that are not pruned and buffers (the statistics of batch norm) go back too, as the papers rewind
    the whole network. Optimizers start with empty state, and :class:`~lightning_structopt.LRDecay` restarts
    from the same moment.

    Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019), for ``to=0``; Frankle et al., "Linear Mode
    Connectivity and the Lottery Ticket Hypothesis" (2020), for an early moment.

    Args:
        to: The moment, as a fraction of the whole training in [0, 1); 0 is initialization. It must come before
            the pruning window.

    Raises:
        ValueError: If ``to`` is out of range.
    """

    to: float = 0.0

    def __post_init__(self) -> None:
        require_in("to", self.to, 0, 1, closed="left")


@dataclass(frozen=True)
class RewindLR(Rewind):
    """Only the learning rate goes back, weights stay: each round retrains with the schedule of the first.

    Optimizers keep their state. Needs :class:`~lightning_structopt.LRDecay`, which restarts from that moment.

    Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning" (2020).

    Args:
        to: The moment, as a fraction of the whole training in [0, 1). It must come before the pruning window.

    Raises:
        ValueError: If ``to`` is out of range.
    """

    to: float = 0.0

    def __post_init__(self) -> None:
        require_in("to", self.to, 0, 1, closed="left")


class TrainsInRounds(ABC):
    """A callback each of whose prunings may begin a round of training, which is what :class:`LRDecay` asks for."""

    rewind: Rewind | None
    _clock: Clock

    @property
    @abstractmethod
    def gone_back(self) -> Horizon:
        """How far the clock of the learning rate is behind training, by rewinding."""

    def round_horizon(self, trainer: Any) -> Horizon:
        """Return the length of one round of training between rewindings, which is that of the first."""
        return self._clock.round_horizon(trainer)


def require_before(rewind: Rewind, begin: float) -> None:
    """Raise unless ``rewind`` goes back to a moment before the window.

    Raises:
        ValueError: If it doesn't.
    """
    if rewind.to >= begin:
        raise ValueError(
            "`rewind` goes back to a moment before the window. Found "
            f"`rewind.to = {rewind.to}` and `begin = {begin}`. Give a later `begin`."
        )


class Rewinder:
    """Remembers the moment to rewind to, and goes back there.

    Args:
        rewind: What goes back.
        module: The module that is trained. It is referred to, never replaced.
    """

    def __init__(self, rewind: Rewind, module: nn.Module) -> None:
        self.rewind = rewind
        self._module = module
        self.marked: Horizon | None = None
        self.gone_back = Horizon(0, 0)
        self._snapshot: dict[str, Tensor] = {}

    def mark(self, now: Horizon) -> None:
        """Remember the module as it is ``now``; only the first call counts."""
        if self.marked is None:
            self.marked = now
            if isinstance(self.rewind, RewindWeights):
                # Cloned: an alias would drift along with the weights.
                self._snapshot = {name: tensor.clone() for name, tensor in self._parts()}

    def go_back(self, optimizers: Sequence[Optimizer], now: Horizon) -> None:
        """Return the module, its optimizers and the schedule's clock to the marked moment.

        Args:
            optimizers: The optimizers of the module.
            now: How far training has come.
        """
        assert self.marked is not None, "nothing was marked before the first step of the ramp"
        self.gone_back = Horizon(now.epochs - self.marked.epochs, now.steps - self.marked.steps)
        if not isinstance(self.rewind, RewindWeights):
            return
        for name, tensor in self._parts():
            tensor.copy_(self._snapshot[name])
        for optimizer in optimizers:
            optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as plain data with whole tensors; all ranks call it together."""
        tensors = self._tensors()
        return {
            "marked": None if self.marked is None else [self.marked.epochs, self.marked.steps],
            "gone_back": [self.gone_back.epochs, self.gone_back.steps],
            "snapshot": {name: full(part, tensors[name]).cpu() for name, part in self._snapshot.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            ValueError: If it is of another module.
        """
        tensors, saved = self._tensors(), state["snapshot"]
        if saved and _shapes(saved) != _shapes(tensors):
            raise ValueError(
                "The snapshot to rewind to in a checkpoint must fit the module. Found other names or shapes. "
                "Resume with the module that the checkpoint was made with."
            )
        self.marked = None if state["marked"] is None else Horizon(*state["marked"])
        self.gone_back = Horizon(*state["gone_back"])
        self._snapshot = {
            name: part_of(whole.to(tensors[name].device), tensors[name]).clone()
            for name, whole in saved.items()
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers: the whole network is rewound."""
        parameters = {name: parameter.detach() for name, parameter in self._module.named_parameters()}
        return parameters | dict(self._module.named_buffers())

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, local(tensor)) for name, tensor in self._tensors().items())


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
