"""What removal saved, as a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich import print as rich_print
from rich.table import Table
from torch import nn
from typing_extensions import override

from lightning_structopt._devices import device_of, moved
from lightning_structopt.profiling.tabular import Tabular
from lightning_structopt.shrinking.copies import copied
from lightning_structopt.shrinking.targets import Latency, Target
from lightning_structopt.shrinking.timing import time_of, warn_if_missed
from lightning_structopt.shrinking.tracing import tensors_of


@dataclass(frozen=True)
class Savings(Tabular):
    """Costs of a module before and after channels were removed.

    Args:
        before: Parameters, FLOPs of the example input, bytes of parameters and buffers, and milliseconds of a
            forward pass, by name.
        after: The same of the smaller module.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]

    @override
    def table(self) -> Table:
        """Return the table."""
        table = Table("", "before", "after", "kept", title="Channels removed")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, before in self.before.items():
            after = self.after[name]
            table.add_row(name, _number(before), _number(after), f"{after / before:.1%}" if before else "")
        return table


def savings(
    modules: tuple[nn.Module, nn.Module],
    flops: tuple[int, int],
    inputs: tuple[Any, ...],
    device: torch.device,
) -> Savings:
    """Count and time two modules.

    Args:
        modules: The module as it was, and the smaller one.
        flops: Their floating-point operations.
        inputs: The arguments of their ``forward``.
        device: Where to time them.
    """
    pairs = zip(modules, flops, strict=True)
    return Savings(*(costs_of(module, count, inputs, device) for module, count in pairs))


def costs_of(
    module: nn.Module, flops: int, inputs: tuple[Any, ...], device: torch.device | None = None
) -> dict[str, float]:
    """Count and time a module.

    Args:
        module: The module.
        flops: Its floating-point operations.
        inputs: The arguments of its ``forward``.
        device: Where to time it; where it is if not given.
    """
    home = device_of(module)
    there = home if device is None else device
    timed = module if there == home else copied(module).to(there)
    return {
        "parameters": sum(each.numel() for each in module.parameters()),
        "FLOPs": flops,
        "bytes": sum(each.numel() * each.element_size() for each in tensors_of(module).values()),
        "latency (ms)": time_of(timed, moved(inputs, there)),
    }


def tell(saved: Savings, target: Target, verbose: bool) -> None:
    """Print what was saved if ``verbose``, and warn if it is not the latency that was asked for."""
    if isinstance(target, Latency):
        warn_if_missed(target.keep, saved.before["latency (ms)"], saved.after["latency (ms)"])
    if verbose:
        rich_print(saved)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
