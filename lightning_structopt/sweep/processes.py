"""A trial as processes of this machine: one forked from a warm interpreter, or several that a new one starts."""

import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from typing_extensions import override

from lightning_structopt.sweep.devices import gpus_of_slot
from lightning_structopt.sweep.forkserver import ForkServer, end_group, shared_server
from lightning_structopt.sweep.lines import Line
from lightning_structopt.sweep.spec import Message, TrialSpec

# Seconds after which to look whether a process is gone whose line is still held by one it started.
_POLL = 0.2
# What a launcher has told this process about itself must not reach its trials.
_LAUNCHERS = ("LOCAL_RANK", "RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "PL_GLOBAL_SEED",
              "PL_SEED_WORKERS", "PL_FAULT_TOLERANT_TRAINING")  # fmt: skip
_PREFIXES = ("MASTER_", "TORCHELASTIC_", "GROUP_WORLD_", "ROLE_")


class Running(Protocol):
    """A trial that has been started."""

    began: float | None
    """When it began to run, on this process's clock; None while it waits for its turn."""

    def messages(self) -> list[Message]:
        """Return what it has said since the last time."""

    def status(self) -> int | None:
        """Return its exit status, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it with all that it started, at once."""


class LocalTrial(Running):
    """A trial on this machine, which speaks over a line and begins at once."""

    line: Line

    @override
    def messages(self) -> list[Message]:
        return self.line.messages()


class ForkedTrial(LocalTrial):
    """A trial on one device.

    Args:
        spec: What to do.
        environment: Its environment variables.
    """

    def __init__(self, spec: TrialSpec, environment: dict[str, str]) -> None:
        self.line, theirs = Line.pair()
        request = {
            "spec": str(spec.write()),
            "log": log_of(spec),
            "cwd": os.getcwd(),
            "environment": environment,
        }
        self._server, self._pid = _fork(request, theirs.fileno())
        theirs.close()
        self._status: int | None = None
        self.began: float | None = monotonic()

    @override
    def status(self) -> int | None:
        if self._status is None:
            self._status = self._server.status(self._pid)
        if self._status is None and self._server.gone and not self.line.open:
            self._status = -signal.SIGKILL  # how it ended nobody knows any more; what it said counts
        return self._status

    @override
    def kill(self) -> None:
        while self.status() is None and not self._server.gone:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # the server ends the rest of its group
            self._server.wait()
        if self._status is None:  # nobody takes its id away before the last of its group has hung up
            end_group(self._pid)
        self.line.close()


def _fork(request: dict[str, Any], channel: int) -> tuple[ForkServer, int]:
    """Fork a trial, from a new server if the one that was there has been killed."""
    server = shared_server()
    try:
        return server, server.fork(request, channel)
    except ConnectionError:
        server = shared_server()
        return server, server.fork(request, channel)


class SpawnedTrial(LocalTrial):
    """A trial in a new interpreter, the first of its ranks.

    Args:
        spec: What to do.
        environment: Its environment variables.
    """

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
        self.began: float | None = monotonic()

    @override
    def status(self) -> int | None:
        if self._process.returncode is None:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return None
            end_group(self._process.pid)  # before its id is free: its ranks go with it
        return self._process.wait()

    @override
    def kill(self) -> None:
        if self._process.returncode is None:
            end_group(self._process.pid)
            self._process.wait()
        self.line.close()


def start_locally(spec: TrialSpec, environment: dict[str, str], devices: int) -> LocalTrial:
    """Start a trial on this machine: on one device, and on Linux, it is forked."""
    return (ForkedTrial if is_forked(devices) else SpawnedTrial)(spec, environment)


def is_forked(devices: int) -> bool:
    """Return whether trials on so many devices are forked."""
    return sys.platform == "linux" and devices == 1


def wait_for(running: Sequence[LocalTrial], timeout: float) -> None:
    """Wait until one of ``running`` may have said something or ended, for ``timeout`` seconds at most."""
    with selectors.DefaultSelector() as selector:
        for process in running:
            if process.line.open:
                selector.register(process.line, selectors.EVENT_READ)
        closing = any(not process.line.open for process in running)
        selector.select(min(timeout, 0.005 if closing else _POLL))


def log_of(spec: TrialSpec) -> str:
    """Return the file that a trial's output goes to, and see to its folder."""
    folder = Path(spec.directory)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / "log.txt")


def trial_environment(
    slot: int, workers: int, threads: int | None, trainer: Mapping[str, Any]
) -> dict[str, str]:
    """Return the environment of a trial: this process's, without what a launcher said to it, and with its devices."""
    scrubbed = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHERS and not name.startswith(_PREFIXES)
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        scrubbed["MASTER_PORT"] = str(free.getsockname()[1])
    if "SLURM_JOB_NAME" in scrubbed:
        # An interactive job to Lightning, which then starts its own ranks.
        scrubbed["SLURM_JOB_NAME"] = "bash"
    if threads is not None:
        scrubbed["OMP_NUM_THREADS"] = str(threads)
    gpus = gpus_of_slot(slot, workers, trainer)
    return scrubbed if gpus is None else scrubbed | {"CUDA_VISIBLE_DEVICES": gpus}
