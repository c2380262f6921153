"""The horizon against a count of what really happens."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support import Classifier, ManualClassifier, loader, trainer

from lightning_structopt._horizon import Horizon, steps_taken, training_horizon


class Ask(pl.Callback):
    horizon: Horizon
    positions: list[int]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.horizon = training_horizon(trainer)
        self.positions = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.positions.append(steps_taken(trainer))


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"max_epochs": 3}, 3),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, 3),  # 4 batches: steps after the 3rd and the last
        ({"max_epochs": 3, "max_steps": 100}, 3),
        ({"max_epochs": 9, "max_steps": 6}, 1.5),
        ({"max_epochs": -1, "max_steps": 6}, 1.5),
        ({"max_epochs": 2, "limit_train_batches": 3}, 2),
        ({"max_epochs": 4, "callbacks": [GradientAccumulationScheduler({1: 2, 3: 4})]}, 4),
        ({"max_epochs": 9, "max_steps": 7, "callbacks": [GradientAccumulationScheduler({1: 2})]}, 2.5),
    ],
)
def test_automatic_optimization(tmp_path: Path, options: dict[str, Any], epochs: float) -> None:
    ask = Ask()
    run = trainer(tmp_path, ask, *options.pop("callbacks", []), **options)
    run.fit(Classifier(), loader())
    assert ask.horizon == Horizon(epochs, run.global_step)
    assert ask.positions == sorted(ask.positions)


def test_manual_optimization_counts_batches(tmp_path: Path) -> None:
    run = trainer(tmp_path, ask := Ask(), max_epochs=3)
    run.fit(ManualClassifier(), loader())
    assert ask.horizon == Horizon(3, 12)
    assert ask.positions == list(range(12))


def test_manual_optimization_with_max_steps_counts_all_optimizers_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, ask := Ask(), max_epochs=-1, max_steps=9)
    run.fit(ManualClassifier(), loader())
    assert ask.horizon == Horizon(math.inf, 9)
    assert ask.positions == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 2}, Horizon(2, math.inf)),
        ({"max_epochs": -1, "max_steps": 5}, Horizon(math.inf, 5)),
        ({"max_epochs": 2, "max_steps": 5}, Horizon(2, 5)),
    ],
)
def test_data_without_a_length(tmp_path: Path, options: dict[str, Any], expected: Horizon) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(loader().dataset)

    trainer(tmp_path, ask := Ask(), **options).fit(
        Classifier(), torch.utils.data.DataLoader(Stream(), batch_size=8)
    )
    assert ask.horizon == expected
