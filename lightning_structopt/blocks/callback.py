"""Callbacks that watch a net: what its adaptive blocks execute, and how large its signals are."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from rich.console import Console
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._checks import require_in, require_lightning, require_type, require_whole
from lightning_structopt._devices import moved
from lightning_structopt._release import LetsGo, release
from lightning_structopt.blocks.adaptive import adaptive_blocks, dense
from lightning_structopt.blocks.execution import Execution, ExecutionMeter, expected_costs
from lightning_structopt.blocks.signals import (
    ActivationTap,
    Finding,
    by_kind,
    explain,
    gradient_sizes,
    judge,
)
from lightning_structopt.profiling import latency
from lightning_structopt.profiling.inputs import as_call


class AdaptiveReport(Callback):
    """Logs how much of each adaptive block ran, and shows a table at the end.

    ``executed/train/NAME``, ``executed/val/NAME`` and ``executed/test/NAME`` are means over the samples of an epoch;
    ``executed/train``, ``executed/val`` and ``executed/test`` are means over blocks, and in the progress bar. They go
    through the module's logger, so checkpoints and early stopping may monitor them.

    The table has each block's fractions in the last epoch. Where the module has an ``example_input_array`` and runs in
    one process, it has what a sample is expected to cost too, and whether skipping saves time.

    Args:
        verbose: Whether to show the table.

    Raises:
        TypeError: If ``verbose`` is not a bool.

    Example:
        >>> AdaptiveReport().execution is None
        True
    """

    def __init__(self, verbose: bool = True) -> None:
        require_type("verbose", verbose, bool)
        self.verbose = verbose
        self.execution: Execution | None = None
        self._meters: dict[str, ExecutionMeter] = {}
        self._fractions: dict[str, dict[str, float]] = {}

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("AdaptiveReport", trainer, pl_module)
        self._meters, self._fractions = {}, {}

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not adaptive_blocks(pl_module):  # not an error: a sweep has candidates of both kinds
            rank_zero_info(
                f"`AdaptiveReport` has nothing to report: `{type(pl_module).__name__}` has no adaptive blocks."
            )

    # Evaluation is the same in both of its stages, of which the trainer says which it is in.

    @override
    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._meters[_stage(trainer)] = ExecutionMeter(pl_module, _device_for_sums(pl_module))

    on_validation_epoch_start = on_test_epoch_start = on_train_epoch_start

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        self._meters["train"].forget(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._meters["train"].add(pl_module, extract_batch_size(batch))

    @override
    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._meters[_stage(trainer)].forget(pl_module)

    on_test_batch_start = on_validation_batch_start

    @override
    def on_validation_batch_end(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._meters[_stage(trainer)].add(pl_module, extract_batch_size(batch))

    on_test_batch_end = on_validation_batch_end

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not trainer.sanity_checking:
            self._log(trainer, pl_module, _stage(trainer))

    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end

    @override
    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._conclude(trainer, pl_module)

    @override
    def on_test_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._conclude(trainer, pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        self._meters = {}
        release(self)

    @override
    def __reduce__(self) -> tuple[type["AdaptiveReport"], tuple[bool]]:
        return type(self), (self.verbose,)

    @override
    def __repr__(self) -> str:
        return f"AdaptiveReport(verbose={self.verbose!r})"

    def _log(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        meter = self._meters[stage]
        if not meter.names or trainer.barebones:
            return
        # All blocks in one sum, so that ranks agree on which of them ran.
        total = trainer.strategy.reduce(meter.sums, reduce_op="sum")
        assert isinstance(total, torch.Tensor)
        found = self._fractions[stage] = meter.fractions(total)
        if found:
            values = {
                f"executed/{stage}/{name}" if name else f"executed/{stage}/itself": v
                for name, v in found.items()
            }
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": 1}
            pl_module.log_dict(values, **options)
            pl_module.log(f"executed/{stage}", sum(found.values()) / len(found), prog_bar=True, **options)

    def _conclude(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        blocks = adaptive_blocks(pl_module)
        if not blocks:
            return
        kinds = {name: type(block).__name__ for name, block in blocks.items()}
        measured: dict[str, Any] = {}
        example = pl_module.example_input_array
        if example is not None and trainer.world_size == 1:
            measured = _measured(pl_module, moved(example, pl_module.device))
        self.execution = Execution(kinds, dict(self._fractions), **measured)
        if self.verbose:
            _show(self.execution)


class ActivationCheck(LetsGo, Callback):
    """Warns of activations and gradients that vanish or explode, with the names of their layers.

    Checked are the outputs and weight gradients of all layers with a weight of two or more dimensions: at the first
    batch, where the net is as it was initialized, and at every so many batches after it. Each layer is warned of once
    for each kind of trouble. Exact zeros are let pass at the first batch, where norms that start at zero mean them.
    Gradients are taken before clipping, after unscaling and accumulation. Layers in compiled modules run no hooks that
    are added later: check the net uncompiled.

    Args:
        every: Check each so many batches, at least 1.
        low: The least root mean square of activations that is fine, in (0, 1); and the least fraction of the largest
            gradient's.
        high: The largest that is fine, of both, in (1, inf).

    Raises:
        TypeError: If ``every`` is not a whole number.
        ValueError: If an argument is out of range.

    Example:
        >>> ActivationCheck(every=50).findings
        []
    """

    def __init__(self, every: int = 100, low: float = 1e-5, high: float = 1e4) -> None:
        require_whole("every", every, 1)
        require_in("low", low, 0, 1, closed="neither")
        require_in("high", high, 1, math.inf, closed="neither")
        self.every, self.low, self.high = every, low, high
        self.findings: list[Finding] = []
        self.activations: dict[str, float] = {}
        self.gradients: dict[str, float] = {}
        self._tap: ActivationTap | None = None
        self._wants_gradients = False
        self._batches = 0

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("ActivationCheck", trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.findings, self._batches = [], 0

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._batches % self.every == 0:
            self._tap = ActivationTap(pl_module)
            self._wants_gradients = True
        self._batches += 1

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if self._wants_gradients:  # with accumulation, some batches after the one that was tapped
            self._wants_gradients = False
            self.gradients = gradient_sizes(pl_module)
            found = judge("gradients", self.gradients, self.low, self.high, trainer.global_step == 0)
            self._report(found, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._tap is not None:
            self.activations, self._tap = self._tap.close(), None
            first = self._batches == 1 and trainer.global_step <= 1
            found = judge("activations", self.activations, self.low, self.high, first)
            self._report(found, 0 if first else trainer.global_step)

    @override
    def __reduce__(self) -> tuple[type["ActivationCheck"], tuple[int, float, float]]:
        return type(self), (self.every, self.low, self.high)

    @override
    def __repr__(self) -> str:
        return f"ActivationCheck(every={self.every}, low={self.low}, high={self.high})"

    def _report(self, found: list[Finding], step: int) -> None:
        known = {(each.layer, each.signal, each.trouble) for each in self.findings}
        new = [each for each in found if (each.layer, each.signal, each.trouble) not in known]
        self.findings += new
        for alike in by_kind(new):
            rank_zero_warn(explain(alike, step, self.low, self.high))

    @override
    def _let_go(self) -> None:
        if self._tap is not None:
            self._tap.close()
        self._tap, self._wants_gradients = None, False
        super()._let_go()


def _measured(pl_module: "pl.LightningModule", example: Any) -> dict[str, Any]:
    """Return costs and latencies, as of :class:`Execution`."""
    timed = latency(pl_module, example)
    with dense(pl_module):
        full = latency(pl_module, example)
    call = as_call(pl_module, example)
    return {
        "costs": expected_costs(pl_module, lambda: call(pl_module)),
        "latencies_ms": (full.median_ms, timed.median_ms),
        "batch_size": timed.batch_size,
    }


def _stage(trainer: "pl.Trainer") -> str:
    """Return ``"train"``, ``"val"`` (also while checking sanity) or ``"test"``."""
    assert trainer.state.stage is not None
    return str(trainer.state.stage.dataloader_prefix)


@rank_zero_only
def _show(execution: Execution) -> None:
    Console().print(execution.table())


def _device_for_sums(pl_module: "pl.LightningModule") -> torch.device:
    # Sums are in float64, which these devices lack.
    return torch.device("cpu") if pl_module.device.type == "mps" else pl_module.device
