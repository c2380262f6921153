"""A run that was killed and resumed ends as the straight run, bit for bit, zeros handed over or not."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import (
    Classifier,
    ManualClassifier,
    adamw,
    assert_same_state,
    dataset,
    loader,
    sgd,
    trainer,
    zeros,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_structopt.pruning import IterativePruning
from lightning_structopt.regularization import L1, GroupLasso, SparsityPenalty
from lightning_structopt.schedules import Linear, Warmup

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
EPOCHS, BATCHES = 4, 4


class Kill(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            raise KeyboardInterrupt


def freezing() -> list[pl.Callback]:
    pruning = IterativePruning(0.5, begin=0.2, end=0.9, interval="step", every=3, verbose=False)
    return [SparsityPenalty(L1(0.05), freeze_zeros=True), pruning]


CASES: dict[str, Any] = {
    "schedule": (
        lambda: Classifier(sgd),
        lambda: [SparsityPenalty(L1(0.05), schedule=Warmup(3, then=Linear()))],
    ),
    "groups": (lambda: Classifier(adamw), lambda: [SparsityPenalty(GroupLasso(0.1))]),
    "gradient": (lambda: Classifier(adamw), lambda: [SparsityPenalty(L1(0.1), "gradient", Linear())]),
    "freezing": (lambda: Classifier(adamw), freezing),
    "manual": (lambda: ManualClassifier(optimizer=adamw), freezing),
}


def run(root: Path, module: Any, data: Any, *callbacks: Any, saving: Any, ckpt: Any = None) -> Any:
    this = trainer(root, *callbacks, ModelCheckpoint(root, save_last=True, **saving), max_epochs=EPOCHS)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        this.fit(module, data, loader(), ckpt_path=ckpt)
    return this


MOMENTS = [
    (name, at) for name in CASES for at in (4, 8, 12, 5, 10, 14) if name != "manual" or at % BATCHES == 0
]


@pytest.mark.parametrize(("name", "at"), MOMENTS)
def test_killed_before_any_batch(tmp_path: Path, name: str, at: int) -> None:
    def data() -> Any:
        return loader() if at % BATCHES == 0 else StatefulDataLoader(dataset(), batch_size=8)

    make, callbacks = CASES[name]
    saving = {} if at % BATCHES == 0 else {"every_n_train_steps": 1}
    straight = run(tmp_path / "straight", make(), data(), *callbacks(), saving=saving)
    run(tmp_path / "killed", make(), data(), *callbacks(), Kill(at), saving=saving)
    mine = callbacks()
    last = tmp_path / "killed" / "last.ckpt"
    resumed = run(tmp_path / "killed", make(), data(), *mine, saving=saving, ckpt=last)
    assert resumed.global_step == straight.global_step
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
    for left, right in zip(resumed.optimizers, straight.optimizers, strict=True):
        assert_same_state(left.state_dict(), right.state_dict())
    assert name == "gradient" or zeros(resumed.lightning_module) > 10
    if len(mine) == 2:
        assert_same_state(
            mine[1].masks, next(c for c in straight.callbacks if c.state_key == mine[1].state_key).masks
        )
        assert mine[1].sparsity > 0.5


def test_checkpoints_hold_nothing_of_the_penalty(tmp_path: Path) -> None:
    run(tmp_path, Classifier(), loader(), SparsityPenalty(L1(0.1)), saving={})
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert not any("SparsityPenalty" in key for key in checkpoint["callbacks"])
