"""Candidates that learn, and candidates with every fault."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from support import Classifier
from torch import Tensor


class Raises(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise RuntimeError("the loss exploded\nin two lines")


class NaNFrom(Classifier):
    """Its metric is no number from an epoch on."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        bad = not self.trainer.sanity_checking and self.current_epoch + 1 >= self.epoch
        self.log("val_acc", float("nan") if bad else 0.99)


class Hangs(Classifier):
    """Ignores requests to end, as collectives do."""

    def on_train_epoch_start(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)


class Killed(Classifier):
    def on_train_epoch_start(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Exits(Classifier):
    def on_train_epoch_start(self) -> None:
        os._exit(3)


class Hungry(Classifier):
    """Takes more memory than there is."""

    def on_train_epoch_start(self) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        self.hoard = torch.empty(1 << 36, dtype=torch.uint8)


class FullDisk(Classifier):
    """No file may grow, as if the disk were full, when its checkpoint is written."""

    def on_train_epoch_end(self) -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))


class LogsOthers(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", 1.0)


class LeavesAChild(Classifier):
    """Starts a process that would outlive it, and writes down which."""

    def __init__(self, path: str, crash: bool) -> None:
        super().__init__()
        self.path, self.crash = path, crash

    def on_train_epoch_start(self) -> None:
        import subprocess

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(self.path).write_text(str(child.pid))
        if self.crash:
            os._exit(1)


def not_a_module() -> Any:
    return "a module"


def raising_factory() -> Any:
    raise ValueError("no such architecture")


def gone(pid: int) -> bool:
    """Whether a process has ended; zombies that nobody has reaped have."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
