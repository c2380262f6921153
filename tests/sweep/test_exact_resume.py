"""A candidate trained in rungs ends with the bits of one trained straight."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from support import CLASSES, FEATURES, Classifier, adamw, assert_same_state, dataset, loader, sgd, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_structopt.pruning import IterativePruning
from lightning_structopt.sweep import ArchitectureSweep, FixedRounds, InProcess, SuccessiveHalving

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*ends with a sparsity"),
    pytest.mark.filterwarnings("ignore:Training ended"),
]


class Noisy(Dataset):
    """Draws from every global random state there is, as augmentations do."""

    def __init__(self) -> None:
        self.data = dataset()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = self.data[index]
        return inputs + 0.1 * (random.random() + np.random.rand() + torch.rand(FEATURES)), label


class Dropped(Classifier):
    def __init__(self, optimizer: Any = sgd) -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, CLASSES))

    def on_train_epoch_start(self) -> None:
        self.noise = torch.rand(1)  # a draw before the loader's

    def on_train_start(self) -> None:
        torch.rand(7)  # more often in three runs than in one


class Plateau(Dropped):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_acc"}}


class Cosine(Dropped):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def ema() -> pl.Callback:
    return EMAWeightAveraging(decay=0.9)


def pruning() -> pl.Callback:
    return IterativePruning(0.8, interval="step", verbose=False)


def plain() -> DataLoader:
    return loader()


def shuffled() -> DataLoader:
    return loader(shuffle=True)


def own_generator() -> DataLoader:
    return loader(shuffle=True, generator=torch.Generator().manual_seed(5))


def noisy() -> DataLoader:
    return DataLoader(Noisy(), batch_size=8, shuffle=True)


def stateful() -> Any:
    return StatefulDataLoader(Noisy(), batch_size=8, shuffle=True)


def no_callback() -> None:
    return None


Case = tuple[Callable[..., Any], Callable[[], Any], Callable[[], Any]]
CASES: dict[str, Case] = {
    "plain": (Classifier, plain, no_callback),
    "shuffled": (Dropped, shuffled, no_callback),
    "own generator": (Dropped, own_generator, no_callback),
    "every random state": (Dropped, noisy, no_callback),
    "stateful loader": (Dropped, stateful, no_callback),
    "plateau": (Plateau, shuffled, no_callback),
    "cosine by steps": (Cosine, shuffled, LearningRateMonitor),
    "EMA": (Dropped, shuffled, ema),
    "pruning": (Dropped, shuffled, pruning),
}


def swept(root: Path, case: Case, budget: Any, arguments: dict[str, Any]) -> Any:
    build, data, callback = case
    callbacks = [c for c in [callback()] if c is not None]
    needs_logger = any(isinstance(c, LearningRateMonitor) for c in callbacks)
    logger = {"logger": lambda name: CSVLogger(root / "logs", name)} if needs_logger else {}
    sweep = ArchitectureSweep(
        {"one": build, "other": build},  # ties are broken by order
        "val_acc",
        budget=budget,
        trainer={"accelerator": "cpu", "callbacks": callbacks, **logger, **arguments},
        executor=InProcess(),
        directory=root,
        seed=3,
        progress=False,
    )
    torch.manual_seed(0)  # some loaders draw a seed when they are made
    result = sweep.run(data(), loader())
    assert result.best.name == "one", str(result)
    return result


def final_state(result: Any) -> dict[str, Any]:
    checkpoint = torch.load(result.best.checkpoint, weights_only=True)
    return {
        name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
    }


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, {}) for name in CASES] + [("plateau", {"accumulate_grad_batches": 3, "precision": "bf16-mixed"})],
    ids=[*CASES, "accumulation and bf16"],
)
def test_rungs_equal_straight_training(name: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    rungs = swept(tmp_path / "rungs", CASES[name], SuccessiveHalving(1, 9, 3), arguments)
    straight = swept(tmp_path / "straight", CASES[name], FixedRounds(rounds=1, epochs=9), arguments)
    # Two start, one goes on: 1 epoch, then 8 more at once, as nobody is left to compare with.
    assert set(rungs.best.scores) == {1, 9}
    assert rungs.best.curve == straight.best.curve
    assert_same_state(final_state(rungs), final_state(straight))


def test_equal_a_plain_trainer(tmp_path: Path) -> None:
    result = swept(tmp_path / "sweep", CASES["plateau"], SuccessiveHalving(2, 9, 2), {})
    pl.seed_everything(3, workers=True, verbose=False)
    module = Plateau()
    straight = trainer(tmp_path, max_epochs=9)
    straight.fit(module, shuffled(), loader())
    checkpoint = torch.load(result.best.checkpoint, weights_only=True)
    assert_same_state(checkpoint["state_dict"], module.state_dict())
    assert_same_state(checkpoint["optimizer_states"], [straight.optimizers[0].state_dict()])
    assert_same_state(result.best.load().state_dict(), module.state_dict())


def test_epochs_that_are_no_rung_change_nothing(tmp_path: Path) -> None:
    case = (lambda: Dropped(adamw), shuffled, no_callback)
    three = swept(tmp_path / "three", case, FixedRounds(rounds=3, epochs=2, keep=2), {})
    two = swept(tmp_path / "two", case, FixedRounds(rounds=2, epochs=3, keep=2), {})
    assert set(three.best.scores) == {2, 4, 6}
    assert_same_state(final_state(three), final_state(two))
