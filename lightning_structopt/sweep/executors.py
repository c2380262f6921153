"""Where trials run: processes on this machine, or this very process."""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt.sweep.devices import count_devices, require_devices
from lightning_structopt.sweep.forkserver import shared_server
from lightning_structopt.sweep.processes import Running, is_forked, start_locally, trial_environment, wait_for
from lightning_structopt.sweep.spec import Message, TrialSpec
from lightning_structopt.sweep.trial import run_trial


class Executor(ABC):
    """Starts trials."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many trials may run at once."""

    @abstractmethod
    def check(self, trainer: Mapping[str, Any], timeout: float | None) -> None:
        """Raise unless it can run trials of these Trainer arguments.

        Raises:
            ValueError: If it can't.
        """

    def prepare(self, trainers: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027
        """Begin with what the first trial would wait for, as trials of these Trainer arguments will start soon."""

    @abstractmethod
    def start(self, spec: TrialSpec, slot: int, trainer: Mapping[str, Any]) -> Running:
        """Start a trial in ``slot``, of which there are :attr:`workers`."""

    def threads(self, trainer: Mapping[str, Any]) -> int | None:
        """Return the CPU threads of each of a trial's processes; None to leave them as they are."""
        return None

    @abstractmethod
    def wait(self, running: Sequence[Any], timeout: float) -> None:
        """Wait until one of ``running`` may have said something or ended, for ``timeout`` seconds at most."""


@dataclass(frozen=True)
class LocalProcesses(Executor):
    """Runs each trial in processes of its own on this machine: a crash or a hang ends that trial and nothing else.

    Trials on one device are forked from a process that has imported PyTorch and Lightning already (on Linux), those
    on several run in a new interpreter, from which Lightning's strategy starts the others. GPUs and cores are shared
    out among the workers.

    Args:
        workers: Trials at once, at least 1.

    Raises:
        TypeError: If ``workers`` is not a whole number.
        ValueError: If it is below 1.

    Example:
        >>> LocalProcesses(workers=2).workers
        2
    """

    workers: int = 1

    def __post_init__(self) -> None:
        require_whole("workers", self.workers, 1)

    @override
    def check(self, trainer: Mapping[str, Any], timeout: float | None) -> None:
        require_devices(trainer, self.workers)

    @override
    def prepare(self, trainers: Sequence[Mapping[str, Any]]) -> None:
        if any(is_forked(count_devices(trainer, self.workers)) for trainer in trainers):
            shared_server()  # which imports PyTorch while we go on

    @override
    def threads(self, trainer: Mapping[str, Any]) -> int | None:
        if "OMP_NUM_THREADS" in os.environ:
            return int(os.environ["OMP_NUM_THREADS"].split(",")[0])
        return max(1, (os.cpu_count() or 1) // (self.workers * count_devices(trainer, self.workers)))

    @override
    def start(self, spec: TrialSpec, slot: int, trainer: Mapping[str, Any]) -> Running:
        environment = trial_environment(slot, self.workers, spec.threads, trainer)
        return start_locally(spec, environment, count_devices(trainer, self.workers))

    @override
    def wait(self, running: Sequence[Any], timeout: float) -> None:
        wait_for(running, timeout)


class InProcess(Executor):
    """Runs trials one after another in this process, to debug them: breakpoints work, a crash ends the sweep.

    Trials on several devices and ``timeout`` need :class:`LocalProcesses`.

    Example:
        >>> InProcess()
        InProcess()
    """

    @property
    @override
    def workers(self) -> int:
        return 1

    @override
    def check(self, trainer: Mapping[str, Any], timeout: float | None) -> None:
        if count_devices(trainer) != 1:
            raise ValueError(
                f"`InProcess` runs trials on one device. Found {count_devices(trainer)}. Give "
                "`executor=LocalProcesses()`, or `devices=1` among the Trainer's arguments."
            )
        if timeout is not None:
            raise ValueError(
                f"`InProcess` can't end a trial that hangs. Found `timeout = {timeout}`. Leave it out, or give "
                "`executor=LocalProcesses()`."
            )

    @override
    def start(self, spec: TrialSpec, slot: int, trainer: Mapping[str, Any]) -> Running:
        said: list[Message] = []
        before = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
        with isolate_rng():
            run_trial(spec, said.append)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        return _Finished(said)

    @override
    def wait(self, running: Sequence[Any], timeout: float) -> None:
        return

    @override
    def __repr__(self) -> str:
        return "InProcess()"

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, InProcess)

    @override
    def __hash__(self) -> int:
        return hash(InProcess)


class _Finished:
    def __init__(self, said: list[Message]) -> None:
        self._said = said
        self.began: float | None = monotonic()

    def messages(self) -> list[Message]:
        said, self._said = self._said, []
        return said

    def status(self) -> int | None:
        return 0

    def kill(self) -> None:
        return
