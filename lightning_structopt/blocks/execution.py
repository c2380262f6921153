"""How much of its blocks a module ran, added up over batches and shown as a table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt._undisturbed import evaluating
from lightning_structopt.blocks.adaptive import AdaptiveBlock, adaptive_blocks


class ExecutionMeter:
    """Adds up what each adaptive block of a module executed, batch by batch.

    Args:
        module: The module.
        device: Where to add up.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        self.names = list(adaptive_blocks(module))
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)

    def forget(self, module: nn.Module) -> None:
        """Let blocks forget their last pass, so that one that doesn't run next counts nothing."""
        for block in adaptive_blocks(module).values():
            block._passes.executed = None

    def add(self, module: nn.Module, rows: int) -> None:
        """Count the pass of ``rows`` samples that each block has just done, without waiting for the device."""
        for index, block in enumerate(adaptive_blocks(module).values()):
            executed = block._passes.executed
            if executed is not None:
                share = torch.as_tensor(executed).to(self.sums).mean()
                self.sums[index] += torch.stack([share * rows, self.sums.new_tensor(rows)])

    def fractions(self, sums: Tensor | None = None) -> dict[str, float]:
        """Return the mean of each block that ran.

        Args:
            sums: Those of all ranks together; this one's if not given.
        """
        totals = (self.sums if sums is None else sums).tolist()
        return {name: done / rows for name, (done, rows) in zip(self.names, totals, strict=True) if rows}


@dataclass(frozen=True)
class Execution:
    """What is known of a module's blocks at the end of a run.

    Args:
        kinds: The class of each block, by its name.
        fractions: The executed fraction of each block, by the stage of the run and by its name.
        costs: Operations that a row is expected to take in each block, by its name.
        latencies_ms: Of a pass in full and of one that skips; None where there was no example input.
        batch_size: Of that pass.
    """

    kinds: Mapping[str, str]
    fractions: Mapping[str, Mapping[str, float]]
    costs: Mapping[str, float] = field(default_factory=dict)
    latencies_ms: tuple[float, float] | None = None
    batch_size: int = 0

    @property
    def verdict(self) -> str:
        """Whether skipping saves time, in a sentence."""
        if self.latencies_ms is None:
            return "Give the module an `example_input_array`, and run one process, to see whether skipping saves time."
        full, skipping = self.latencies_ms
        found = f"{full:.3g} ms in full, {skipping:.3g} ms adaptive, for {self.batch_size} samples"
        if skipping < full:
            return f"{found}: {full / skipping:.2f}x as fast."
        return f"{found}: adaptive is slower here. Blocks this small cost less than deciding about them."

    def table(self) -> Table:
        """Return the blocks as a table."""
        table = Table(
            title="Adaptive blocks: executed fraction", caption=self.verdict, caption_justify="left"
        )
        for column in ("block", "kind"):
            table.add_column(column)
        for column in (*self.fractions, *(["expected FLOPs"] if self.costs else [])):
            table.add_column(column, justify="right")
        for name, kind in self.kinds.items():
            shares = [f"{found[name]:.3f}" if name in found else "" for found in self.fractions.values()]
            cost = [f"{self.costs[name]:,.0f}" if name in self.costs else ""] if self.costs else []
            table.add_row(name or "(itself)", kind, *shares, *cost)
        return table


def expected_costs(module: nn.Module, run: Callable[[], Any]) -> dict[str, float]:
    """Return the operations that a row is expected to take in each adaptive block.

    Args:
        module: The module.
        run: Calls it on example inputs.

    Returns:
        The means over rows, by the name of each block that ran.
    """
    calls: dict[AdaptiveBlock, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(block, AdaptiveBlock)
        calls[block] = args, kwargs

    blocks = adaptive_blocks(module)
    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks.values()]
    with evaluating(module), torch.no_grad():
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        found = {}
        for name, block in blocks.items():
            if block in calls:
                args, kwargs = calls[block]
                found[name] = float(block.expected_cost(*args, **kwargs).double().mean())
    return found
