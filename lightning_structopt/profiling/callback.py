"""CostMonitor: what a training run takes, while it runs."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.data import extract_batch_size
from typing_extensions import override

from lightning_structopt._checks import require_lightning
from lightning_structopt._release import release
from lightning_structopt.profiling.training_cost import TrainingCost

if TYPE_CHECKING:
    import lightning.pytorch as pl


class CostMonitor(Callback):
    """Adds up what training takes: seconds, epochs, optimizer steps, samples and the peak of memory.

    It is saved in checkpoints, so a run that was killed goes on counting from its last checkpoint: the time between
    that and the kill is not in it. Give it to :func:`~lightning_structopt.compare`.

    Example:
        >>> CostMonitor().cost
        TrainingCost(seconds=0.0, epochs=0, steps=0, samples=0, peak_bytes=0)
    """

    def __init__(self) -> None:
        self._before = TrainingCost()
        self._resumed = False
        self._start: float | None = None
        self._progress = (0, 0)
        self._now = (0, 0)
        self._samples = 0
        self._peak = 0

    @property
    def cost(self) -> TrainingCost:
        """What training has taken so far."""
        seconds = 0.0 if self._start is None else perf_counter() - self._start
        epochs, steps = (now - then for now, then in zip(self._now, self._progress, strict=True))
        before = self._before
        return TrainingCost(
            before.seconds + seconds,
            before.epochs + epochs,
            before.steps + steps,
            before.samples + self._samples,
            max(before.peak_bytes, self._peak),
        )

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        require_lightning("CostMonitor", trainer, pl_module)
        if stage == "fit":
            self._resumed = False

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if not self._resumed:
            self._before = TrainingCost()
        self._resumed = False
        self._samples, self._peak = 0, 0
        self._progress = self._now = (trainer.current_epoch, trainer.global_step)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start = perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += extract_batch_size(batch)
        self._now = (trainer.current_epoch, trainer.global_step)

    @override
    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._now = (trainer.current_epoch + 1, trainer.global_step)
        self._peak = max(self._peak, _peak_bytes(pl_module.device))

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._stop(pl_module)

    @override
    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        self._stop(pl_module)

    @override
    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        release(self)

    @override
    def state_dict(self) -> dict[str, Any]:
        return asdict(self.cost)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._before, self._resumed = TrainingCost(**state_dict), True

    @override
    def __repr__(self) -> str:
        return "CostMonitor()"

    def _stop(self, pl_module: "pl.LightningModule") -> None:
        if self._start is None:
            return
        self._peak = max(self._peak, _peak_bytes(pl_module.device))
        self._before, self._start = self.cost, None
        self._progress = self._now = (0, 0)
        self._samples = 0


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
