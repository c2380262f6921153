"""What all adaptive blocks share: what a pass cost, what it adds to the loss, and how to run them in full."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_structopt._undisturbed import undisturbed
from lightning_structopt.blocks.rows import needs_dense_form


@dataclass(frozen=True)
class Pass:
    """What one training pass of a block left for the loss.

    Args:
        loss: The block's own auxiliary loss, a scalar with a graph; None if it has none.
        executed: The differentiable share of its rows that its body ran on; None unless a budget may ask for it.
    """

    loss: Tensor | None
    executed: Tensor | None = None


class Passes:
    """The passes of a block that wait for :func:`auxiliary_loss`, each for as long as its graph lives.

    They belong to a step of one process: copies and pickles start without any.
    """

    def __init__(self) -> None:
        self.waiting: list[Pass] = []
        self.collected = False
        self.missed = False  # whether there was something to tell that can't be told any more
        self.executed: Tensor | float | None = None

    def add(self, entry: Pass, output: Tensor) -> None:
        """Keep ``entry``, after a collection in place of what was collected, until ``output`` is done with."""
        if self.collected:
            self.clear()
        self.waiting.append(entry)
        self.missed = False
        if output.requires_grad:
            # The graph owns the hook and the hook its key, so a graph that is thrown away takes its entry along.
            key = _Key()
            output.register_hook(_Ending(key, weakref.ref(self)))  # type: ignore[no-untyped-call]
            weakref.finalize(key, _discard, weakref.ref(self), weakref.ref(entry))

    def clear(self) -> None:
        """Let go of all graphs."""
        self.waiting, self.collected = [], False

    def __deepcopy__(self, memo: Any) -> "Passes":
        return Passes()

    @override
    def __reduce__(self) -> tuple[type["Passes"], tuple[()]]:
        return Passes, ()


class _Key:
    """Something that ends with its graph."""


class _Ending:
    """What backward does on its way through a block: the pass is over."""

    def __init__(self, key: _Key, passes: "weakref.ref[Passes]") -> None:
        self.key, self.passes = key, passes

    def __call__(self, gradient: Tensor) -> None:
        passes = self.passes()
        if passes is not None and passes.waiting:
            passes.missed = not passes.collected
            passes.clear()


def _discard(passes: "weakref.ref[Passes]", entry: "weakref.ref[Pass]") -> None:
    owner, gone = passes(), entry()
    if owner is not None and gone is not None:
        owner.missed = not owner.collected
        owner.waiting = [each for each in owner.waiting if each is not gone]


class AdaptiveBlock(nn.Module, ABC):
    """A block that decides for each row, a sample or a token, how much of itself to run."""

    def __init__(self) -> None:
        super().__init__()
        self._passes = Passes()
        self._dense = False

    @property
    def executed_fraction(self) -> float:
        """The share of the block's work that its last pass did, in [0, 1]; NaN before the first one.

        In training all of it runs for the sake of gradients, and this is the share that counted.
        """
        executed = self._passes.executed
        if isinstance(executed, Tensor):
            return float(executed.float().mean())
        return float("nan") if executed is None else executed

    @abstractmethod
    def expected_cost(self, inputs: Tensor) -> Tensor:
        """Return the floating-point operations that each row is expected to take, of shape (rows,)."""

    @property
    def _runs_dense(self) -> bool:
        return self._dense or needs_dense_form()

    # Hooks and lists are none of a compiled graph's business: it breaks here, after the block's own work.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _remember(
        self, executed: Tensor | float, output: Tensor | None = None, entry: Pass | None = None
    ) -> None:
        """Keep what a pass did, and in training what it adds to the loss until backward has gone through it.

        Args:
            executed: Its mean is the share of the work that was done. It is taken when somebody asks.
            output: What backward comes through.
            entry: What waits for :func:`auxiliary_loss`.
        """
        if needs_dense_form():
            return
        self._passes.executed = executed.detach() if isinstance(executed, Tensor) else executed
        if entry is None or output is None or in_backward():
            return
        if torch.is_grad_enabled():
            self._passes.add(entry, output)
        elif not self._passes.waiting:
            self._passes.missed = True


def in_backward() -> bool:
    """Tell whether a forward pass is repeated inside of a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def adaptive_blocks(module: nn.Module) -> dict[str, AdaptiveBlock]:
    """Return the adaptive blocks of ``module`` by name, itself included."""
    return {name: part for name, part in module.named_modules() if isinstance(part, AdaptiveBlock)}


@contextmanager
def dense(module: nn.Module) -> Iterator[None]:
    """Run all of the adaptive blocks of ``module``, and leave out afterwards what they would have skipped.

    The outputs are the same; the time is that of blocks that don't adapt. It is the form that is exported.

    Args:
        module: The module.

    Yields:
        Nothing.

    Example:
        >>> with dense(nn.Linear(2, 2)):
        ...     pass
    """
    blocks = [(block, block._dense) for block in adaptive_blocks(module).values()]
    try:
        for block, _ in blocks:
            block._dense = True
        yield
    finally:
        for block, before in blocks:
            block._dense = before


def flops_per_row(module: nn.Module, inputs: Tensor) -> float:
    """Return the floating-point operations of ``module`` for one row of ``inputs``, in evaluation mode."""
    if len(inputs) == 0:
        return 0.0
    return flops(module, inputs) / len(inputs)


def flops(module: nn.Module, *inputs: Tensor) -> float:
    """Return the floating-point operations of ``module`` for ``inputs``, in evaluation mode."""
    with undisturbed(module), dense(module), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())
