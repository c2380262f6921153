"""A million rows: members are loaded once, and memory doesn't grow with the rows."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import trainer
from torch import Tensor, nn

from lightning_structopt import ParallelEnsemble, SerialEnsemble

ROWS, BATCH, CLASSES = 1_000_000, 8192, 32
STATUS = Path("/proc/self/statm")
MEGABYTE = 2**20


class Rows:
    """Makes batches as they are asked for."""

    def __len__(self) -> int:
        return -(-ROWS // BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, ROWS, BATCH):
            count = min(BATCH, ROWS - start)
            yield torch.ones(count, 8)


class Loaded(pl.LightningModule):
    loads = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        Loaded.loads += 1


class Watch(pl.Callback):
    """Takes predictions away, and notes how much memory the process holds."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0
        self.held: list[int] = []

    def on_predict_batch_end(self, trainer: Any, module: Any, outputs: Tensor, *_: Any) -> None:
        self.rows += len(outputs)
        self.held.append(int(STATUS.read_text().split()[1]) * resource.getpagesize())


def checkpoints(folder: Path, count: int = 3) -> list[tuple[type[Loaded], Path]]:
    found = []
    for index in range(count):
        module, path = Loaded(), folder / f"{index}.ckpt"
        torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": pl.__version__}, path)
        found.append((Loaded, path))
    return found


@pytest.mark.skipif(not STATUS.exists(), reason="only Linux tells what a process holds")
@pytest.mark.parametrize("kind", [ParallelEnsemble, SerialEnsemble])
def test_a_million_rows_stream(kind: Any, tmp_path: Path) -> None:
    Loaded.loads = 0
    ensemble, watch = kind(checkpoints(tmp_path)), Watch()
    trainer(tmp_path, watch).predict(ensemble, Rows(), return_predictions=False)
    assert watch.rows == ROWS
    assert Loaded.loads == 3
    first = max(watch.held[: len(watch.held) // 10])  # by then all buffers are there
    # What the ensemble alone puts out takes 122 MB.
    assert max(watch.held) - first < 48 * MEGABYTE
