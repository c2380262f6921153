"""Trials on a Ray cluster: each is a Ray task that starts the same processes as on this machine."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from typing_extensions import override

from lightning_structopt._checks import require_mapping, require_type
from lightning_structopt.sweep.devices import count_devices
from lightning_structopt.sweep.executors import Executor
from lightning_structopt.sweep.processes import Running, start_locally, trial_environment, wait_for
from lightning_structopt.sweep.spec import Message, TrialSpec

_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
_GPU = ("gpu", "cuda")


@dataclass(frozen=True)
class RayCluster(Executor):
    """Runs each trial as a task of a Ray cluster: on whichever machine has what it takes.

    As many trials run at once as the cluster has room for. The sweep's directory must be one that all machines see
    under the same name, and Python and its packages must be the same on all of them. ``timeout`` counts from when a
    trial begins, not from when it queues. Ray starts on this machine if there is no cluster.

    Args:
        address: Of the cluster, as ``ray.init`` takes it: ``"auto"``, ``"ray://..."`` is not one. None for the one that
            this process or ``RAY_ADDRESS`` names, or a new one on this machine.
        resources: What a trial takes, by Ray's names: ``{"CPU": 4, "GPU": 1}``, also custom ones. By default one CPU
            for each of its devices.

    Raises:
        TypeError: If ``resources`` aren't numbers by name.
        ValueError: If one is not above 0, or ``address`` is one of Ray's client.

    Example:
        >>> RayCluster(resources={"CPU": 2}).resources
        {'CPU': 2}
    """

    address: str | None = None
    resources: Mapping[str, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.address is not None:
            require_type("address", self.address, str)
        if self.resources is not None:
            require_mapping("resources", self.resources)
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"`RayCluster` must run on a machine of the cluster. Found `address = {self.address!r}`, Ray's client. "
                "Start the sweep on one of the cluster's machines, with `address='auto'`."
            )
        for name, amount in (self.resources or {}).items():
            if isinstance(amount, bool) or not isinstance(amount, (int, float)):
                raise TypeError(f"`resources` must be numbers by name. Found `{name} = {amount!r}`.")
            if not 0 < amount < math.inf:
                raise ValueError(f"`resources` must be above 0. Found `{name} = {amount}`. Leave it out.")

    @property
    @override
    def workers(self) -> int:
        there = _connected(self.address).cluster_resources()
        needed = self.resources or {"CPU": 1}
        room = min(int(there.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items())
        if room < 1:
            found = {name: there.get(name, 0.0) for name in needed}
            raise ValueError(
                f"`resources` must be there for one trial at least. Found {needed} asked, and {found} in the cluster. "
                "Ask for less, or add machines."
            )
        return room

    @override
    def check(self, trainer: Mapping[str, Any], timeout: float | None) -> None:
        _ray()
        given, devices = (self.resources or {}).get("GPU", 0), trainer.get("devices", "auto")
        asked = 1 if devices in {"auto", "-1", -1} else count_devices(trainer)
        if trainer.get("accelerator") in _GPU and given < asked:
            raise ValueError(
                f"`RayCluster` gives trials the GPUs that are among `resources`. Found `devices={devices!r}` and "
                f"`resources = {self.resources!r}`. Give `resources={{'GPU': {asked}, 'CPU': ...}}`."
            )

    @override
    def threads(self, trainer: Mapping[str, Any]) -> int | None:
        needed = self._needed(trainer)
        return max(1, int(needed.get("CPU", 1) / count_devices(trainer)))

    @override
    def start(self, spec: TrialSpec, slot: int, trainer: Mapping[str, Any]) -> Running:
        ray = _connected(self.address)
        needed = self._needed(trainer)
        custom = {name: amount for name, amount in needed.items() if name not in _OPTIONS}
        options = {_OPTIONS[name]: amount for name, amount in needed.items() if name in _OPTIONS}
        task = ray.remote(_relay).options(
            **{"num_cpus": 0, **options},
            resources=custom,
            name=spec.name,
            num_returns="streaming",
            max_retries=0,  # the sweep decides what comes of a trial that failed
        )
        asked = {name: trainer[name] for name in ("accelerator", "devices") if name in trainer}
        return _Task(ray, task.remote(spec, asked, "GPU" in needed))

    @override
    def wait(self, running: Sequence[Any], timeout: float) -> None:
        waiting = [task.stream for task in running if not task.ended]
        if len(waiting) == len(running):
            _ray().wait(waiting, timeout=None if math.isinf(timeout) else timeout, fetch_local=False)

    def _needed(self, trainer: Mapping[str, Any]) -> Mapping[str, float]:
        return self.resources or {"CPU": count_devices(trainer)}


class _Task:
    """A trial somewhere in the cluster."""

    def __init__(self, ray: Any, stream: Any) -> None:
        self._ray, self.stream = ray, stream
        self.began: float | None = None
        self._status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self._status is not None

    def messages(self) -> list[Message]:
        found: list[Message] = []
        while not self.ended and self._ray.wait([self.stream], timeout=0, fetch_local=False)[0]:
            try:
                found += self._heard(self._ray.get(next(self.stream)))
            except StopIteration:
                self._status = 1 if self._status is None else self._status
            except (
                self._ray.exceptions.RayError
            ) as error:  # its machine is gone, or Ray ended it for its memory
                self._status = 1
                found.append({
                    "failed": f"Ray: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"
                })
        return found

    def _heard(self, message: Message) -> list[Message]:
        if "began" in message:
            self.began = monotonic()
            return []
        if "status" in message:
            self._status = message["status"]
            return []
        return [message]

    def status(self) -> int | None:
        return self._status

    def kill(self) -> None:
        """End the task's process; what that has started ends with it, as the line to it does."""
        if not self.ended:
            self._ray.cancel(self.stream, force=True)


def _relay(spec: TrialSpec, trainer: Mapping[str, Any], gpus: bool) -> Iterator[Message]:
    """Run a trial where Ray has put us, and pass on what it says; in the end, its status."""
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # those of the machine are others'
    devices = count_devices(trainer)
    trial = start_locally(spec, trial_environment(0, 1, spec.threads, trainer), devices)
    try:
        yield {"began": True}
        while True:
            wait_for([trial], math.inf)
            # Not `yield from`: Ray compiles this to a generator that sends, which lists don't take.
            for message in trial.messages():
                yield message  # noqa: UP028
            status = trial.status()
            if status is not None:
                for message in trial.messages():  # it may have said its last words since
                    yield message  # noqa: UP028
                yield {"status": status}
                return
    finally:
        trial.kill()


def _ray() -> Any:
    """Return the package.

    Raises:
        ModuleNotFoundError: If it isn't installed.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "`RayCluster` needs the package `ray`. Found that it isn't installed. "
            "`pip install lightning-structopt[ray]`, or give `executor=LocalProcesses()`."
        ) from error
    return ray


def _connected(address: str | None) -> Any:
    """Return the package, connected to the cluster."""
    ray = _ray()
    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False)
    return ray
