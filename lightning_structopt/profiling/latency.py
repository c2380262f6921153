"""How long a forward pass takes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt._undisturbed import evaluating
from lightning_structopt.profiling.inputs import as_call, gpu_of

_WARM_UP = 3


@dataclass(frozen=True)
class Latency:
    """The time of one forward pass in evaluation mode, in milliseconds.

    Args:
        batch_size: Samples in the pass.
        threads: CPU threads that it may use.
        median_ms: The median over the repeats.
        quartiles_ms: The lower and the upper quartile.
        repeats: How many passes, or blocks of passes where one is too short to time, were timed.
    """

    batch_size: int
    threads: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    repeats: int

    @property
    def samples_per_second(self) -> float:
        """The throughput at the median."""
        return 1000 * self.batch_size / self.median_ms


def latency(
    module: nn.Module,
    example_input: Any,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    seconds: float = 0.5,
) -> Latency:
    """Time the forward pass of ``module`` in evaluation mode, without gradients, after warming up.

    Timed by :class:`torch.utils.benchmark.Timer` on the CPU and by CUDA events on a GPU.

    Args:
        module: Left as it was.
        example_input: A tensor, a tuple of arguments, or a dict of keyword arguments, on the module's device.
        batch_size: Samples in the pass; those of ``example_input`` if not given.
        threads: CPU threads; as many as PyTorch uses now if not given.
        seconds: How long to repeat.

    Returns:
        Median and quartiles.

    Raises:
        TypeError: If an argument is of the wrong kind or ``example_input`` doesn't fit.
        ValueError: If a number is out of range, or the input is on another device than the module.

    Example:
        >>> latency(nn.Linear(4, 2), torch.ones(8, 4), threads=1, seconds=0.01).batch_size
        8
    """
    call = as_call(module, example_input)
    call = call if batch_size is None else call.with_batch_size(batch_size)
    threads = torch.get_num_threads() if threads is None else threads
    require_whole("threads", threads, 1)
    require_in("seconds", seconds, 0, math.inf, closed="neither")
    gpu = gpu_of(module, call)
    with evaluating(module), torch.inference_mode():
        times = (
            _cpu_times(lambda: call(module), threads, seconds)
            if gpu is None
            else _gpu_times(lambda: call(module), gpu, seconds)
        )
    lower, middle, upper = quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return Latency(call.batch_size, threads, 1000 * middle, (1000 * lower, 1000 * upper), len(times))


def _cpu_times(run: Callable[[], Any], threads: int, seconds: float) -> list[float]:
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    timer.timeit(_WARM_UP)
    return timer.blocked_autorange(min_run_time=seconds).times


def _gpu_times(run: Callable[[], Any], gpu: torch.device, seconds: float) -> list[float]:
    times: list[float] = []
    with torch.cuda.device(gpu):  # events are recorded on the current device's stream
        for _ in range(_WARM_UP):
            run()
        spent = 0.0
        while spent < seconds:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
            spent += times[-1]
    return times
