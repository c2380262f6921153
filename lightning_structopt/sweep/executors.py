"""Where trials run: processes on this machine, or this very process."""

import os
import selectors
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt.sweep.devices import count_devices, gpus_of_slot, require_devices
from lightning_structopt.sweep.forkserver import end_group, shared_server
from lightning_structopt.sweep.lines import Line
from lightning_structopt.sweep.spec import Message, TrialSpec
from lightning_structopt.sweep.trial import run_trial

# Seconds after which to look whether a process is gone whose line is still held by one it started.
_POLL = 0.2
# What a launcher has told this process about itself must not reach its trials.
_LAUNCHERS = ("LOCAL_RANK", "RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PL_GLOBAL_SEED",
              "PL_SEED_WORKERS", "PL_FAULT_TOLERANT_TRAINING")  # fmt: skip
_PREFIXES = ("MASTER_", "TORCHELASTIC_", "GROUP_WORLD_", "ROLE_")


class Running(Protocol):
    """A trial that has been started."""

    def messages(self) -> list[Message]:
        """Return what it has said since the last time."""

    def status(self) -> int | None:
        """Return its exit status, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it with all that it started, at once."""


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
    def threads(self, trainer: Mapping[str, Any]) -> int | None:
        if "OMP_NUM_THREADS" in os.environ:
            return int(os.environ["OMP_NUM_THREADS"].split(",")[0])
        return max(1, (os.cpu_count() or 1) // (self.workers * count_devices(trainer, self.workers)))

    @override
    def start(self, spec: TrialSpec, slot: int, trainer: Mapping[str, Any]) -> Running:
        environment = _environment(slot, self.workers, spec.threads, trainer)
        forked = sys.platform == "linux" and count_devices(trainer, self.workers) == 1
        return (_Forked if forked else _Spawned)(spec, environment)

    @override
    def wait(self, running: Sequence[Any], timeout: float) -> None:
        with selectors.DefaultSelector() as selector:
            for process in running:
                if process.line.open:
                    selector.register(process.line, selectors.EVENT_READ)
            closing = any(not process.line.open for process in running)
            selector.select(min(timeout, 0.005 if closing else _POLL))


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

    def messages(self) -> list[Message]:
        said, self._said = self._said, []
        return said

    def status(self) -> int | None:
        return 0

    def kill(self) -> None:
        return


class _Forked:
    """A trial on one device."""

    def __init__(self, spec: TrialSpec, environment: dict[str, str]) -> None:
        self.line, theirs = Line.pair()
        request = {
            "spec": str(spec.write()),
            "log": log_of(spec),
            "cwd": os.getcwd(),
            "environment": environment,
        }
        self._server = shared_server()
        self._pid = self._server.fork(request, theirs.fileno())
        theirs.close()
        self._status: int | None = None

    def messages(self) -> list[Message]:
        return self.line.messages()

    def status(self) -> int | None:
        if self._status is None:
            self._status = self._server.status(self._pid)
        return self._status

    def kill(self) -> None:
        if self.status() is None:
            os.kill(self._pid, signal.SIGKILL)  # the server ends the rest of its group
            while self.status() is None:
                self._server.wait()
        self.line.close()


class _Spawned:
    """A trial in a new interpreter, the first of its ranks."""

    def __init__(self, spec: TrialSpec, environment: dict[str, str]) -> None:
        self.line, theirs = Line.pair()
        imports = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with Path(log_of(spec)).open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightning_structopt.sweep", str(spec.write())],
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment | {"STRUCTOPT_CHANNEL": str(theirs.fileno()), "PYTHONPATH": imports},
            )
        theirs.close()

    def messages(self) -> list[Message]:
        return self.line.messages()

    def status(self) -> int | None:
        if self._process.returncode is None:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            end_group(self._process.pid)  # before its id is free: its ranks go with it
        return self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            end_group(self._process.pid)
            self._process.wait()
        self.line.close()


def log_of(spec: TrialSpec) -> str:
    """Return the file that a trial's output goes to, and see to its folder."""
    folder = Path(spec.directory)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / "log.txt")


def _environment(slot: int, workers: int, threads: int | None, trainer: Mapping[str, Any]) -> dict[str, str]:
    scrubbed = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHERS and not name.startswith(_PREFIXES)
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        scrubbed["MASTER_PORT"] = str(free.getsockname()[1])
    if "SLURM_JOB_NAME" in scrubbed:
        scrubbed["SLURM_JOB_NAME"] = (
            "bash"  # an interactive job to Lightning, which then starts its own ranks
        )
    if threads is not None:
        scrubbed["OMP_NUM_THREADS"] = str(threads)
    gpus = gpus_of_slot(slot, workers, trainer)
    return scrubbed if gpus is None else scrubbed | {"CUDA_VISIBLE_DEVICES": gpus}
