"""How long each layer of a forward pass takes."""

from abc import ABC, abstractmethod
from collections import defaultdict
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any, final

import torch
from torch import nn
from typing_extensions import override

from lightning_structopt._undisturbed import undisturbed
from lightning_structopt.profiling.following import following
from lightning_structopt.profiling.inputs import Call, gpu_of


def layer_ms(module: nn.Module, call: Call, seconds: float) -> dict[str, float]:
    """Time what each submodule does itself, without those inside it, by hooks around each.

    The hooks take time as well, and what is compiled runs as it was written, so this shows where time goes; the sum
    is not the latency of the whole.

    Returns:
        By name, the median over some passes, in milliseconds.
    """
    gpu = gpu_of(module, call)
    clock: _Clock = _CPUClock() if gpu is None else _GPUClock(gpu)
    found: defaultdict[str, list[float]] = defaultdict(list)
    with undisturbed(module), torch.no_grad(), following(module, clock.enter, clock.leave):
        call(module)  # warms up
        end = perf_counter() + seconds
        while True:
            clock.clear()
            call(module)
            for name, spent in clock.spent().items():
                found[name].append(spent)
            if perf_counter() >= end:
                break
    return {name: 1000 * median(times) for name, times in found.items()}


class _Clock(ABC):
    """Keeps a time stamp wherever another submodule comes to run."""

    def __init__(self) -> None:
        self._running: list[str] = []
        self._stamps: list[tuple[str | None, Any]] = []  # who runs from then on

    def clear(self) -> None:
        """Forget all stamps."""
        self._stamps.clear()

    def enter(self, name: str) -> None:
        """Note that ``name`` starts."""
        self._running.append(name)
        self._stamps.append((name, self._now()))

    def leave(self) -> None:
        """Note that what runs is done, and what called it goes on."""
        self._running.pop()
        self._stamps.append((self._running[-1] if self._running else None, self._now()))

    def spent(self) -> dict[str, float]:
        """Return the seconds of each submodule."""
        found: defaultdict[str, float] = defaultdict(float)
        for (name, start), (_, end) in pairwise(self._stamps):
            if name is not None:
                found[name] += self._between(start, end)
        return found

    @abstractmethod
    def _now(self) -> Any:
        """Return a time stamp."""

    @abstractmethod
    def _between(self, start: Any, end: Any) -> float:
        """Return the seconds between two time stamps."""


@final
class _CPUClock(_Clock):
    @override
    def _now(self) -> float:
        return perf_counter()

    @override
    def _between(self, start: float, end: float) -> float:
        return end - start


@final
class _GPUClock(_Clock):
    def __init__(self, gpu: torch.device) -> None:
        super().__init__()
        self._gpu = gpu

    @override
    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._gpu))
        return event

    @override
    def _between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
