"""Snapshots: rates against a closed form, weights at cycle ends, resuming."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import Classifier, ManualClassifier, adamw, assert_same_state, dataset, loader, trainer

from lightning_structopt.ensembles import SnapshotEnsemble
from lightning_structopt.lr_decay import LRDecay
from lightning_structopt.schedules import Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.states: list[Any] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.states.append(copy.deepcopy(pl_module.state_dict()))


def fit(
    root: Path, *callbacks: pl.Callback, module: Any = None, ckpt: Any = None, **kwargs: Any
) -> pl.Trainer:
    run = trainer(root, *callbacks, **kwargs)
    run.fit(Classifier(adamw) if module is None else module, loader(), loader(), ckpt_path=ckpt)
    return run


@pytest.mark.parametrize(("cycles", "minimum"), [(1, 0.0), (2, 0.1), (4, 0.0), (3, 0.0), (16, 0.0)])
def test_rates_and_snapshots(cycles: int, minimum: float, tmp_path: Path) -> None:
    callback, rates = SnapshotEnsemble(cycles, minimum), Rates()
    fit(tmp_path, callback, rates)  # 16 steps
    ends = [math.ceil(16 * cycle / cycles) for cycle in range(cycles + 1)]
    expected = []
    for start, end in zip(ends, ends[1:], strict=False):
        for step in range(end - start):
            share = 0.5 * (1 + math.cos(math.pi * step / (end - start)))
            expected.append(0.01 * (minimum + (1 - minimum) * share))
    assert rates.rates == pytest.approx(expected)
    assert len(callback.snapshots) == cycles
    for snapshot, end in zip(callback.snapshots, ends[1:], strict=True):
        assert_same_state(dict(snapshot), dict(rates.states[end - 1]))


def test_the_ensemble_is_that_of_its_snapshots(tmp_path: Path) -> None:
    callback = SnapshotEnsemble(2)
    run = fit(tmp_path, callback)
    ensemble = callback.ensemble(Classifier, combine="logits")
    inputs = dataset().tensors[0]
    last = run.lightning_module.eval()
    torch.testing.assert_close(ensemble.members[1](inputs), last(inputs))
    mean = sum(member(inputs) for member in callback.members(Classifier)) / 2
    torch.testing.assert_close(ensemble(inputs), mean.log_softmax(1))
    assert not torch.equal(ensemble.members[0](inputs), ensemble.members[1](inputs))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_equals_straight(accumulate: int, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    straight = SnapshotEnsemble(3)
    run = fit(tmp_path, straight, saved, **options)
    for path in tmp_path.glob("*.ckpt"):
        resumed = SnapshotEnsemble(3)
        again = fit(tmp_path, resumed, ckpt=path, **options)
        assert_same_state(resumed.state_dict(), straight.state_dict())
        assert_same_state(again.lightning_module.state_dict(), run.lightning_module.state_dict())


def test_a_second_fit_starts_again_and_the_same_trainer_goes_on(tmp_path: Path) -> None:
    callback = SnapshotEnsemble(2)
    fit(tmp_path, callback)
    first = copy.deepcopy(callback.snapshots)
    run = fit(tmp_path, callback)
    assert_same_state(callback.snapshots, first)
    run.fit_loop.max_epochs = 8
    rates = Rates()
    run.callbacks.append(rates)
    run.fit(run.lightning_module, loader())
    assert rates.rates[0] == pytest.approx(0.01)  # 16 of 32 steps are over: the second cycle begins
    assert rates.rates[8] == pytest.approx(0.005)
    assert_same_state(callback.snapshots, first)


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = adamw(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def test_wrong_arguments_and_hosts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`cycles` must be at least 1"):
        SnapshotEnsemble(0)
    with pytest.raises(ValueError, match=r"`minimum` must be in \[0, 1\)"):
        SnapshotEnsemble(2, minimum=1.0)
    with pytest.raises(ValueError, match="Found none. Run `fit` with this callback first"):
        SnapshotEnsemble().ensemble(Classifier)
    with pytest.raises(ValueError, match="one owner. Found `SnapshotEnsemble` and a `ExponentialLR`"):
        fit(tmp_path, SnapshotEnsemble(2), module=Scheduled())
    with pytest.raises(ValueError, match="one owner"):
        fit(tmp_path, SnapshotEnsemble(2), LRDecay(Linear()))
    with pytest.raises(ValueError, match="automatic_optimization = False"):
        fit(tmp_path, SnapshotEnsemble(2), module=ManualClassifier())
    with pytest.raises(ValueError, match="17 steps at least. Found 16"):
        fit(tmp_path, SnapshotEnsemble(17))
    with pytest.raises(ValueError, match="known end and 2 steps"):
        fit(tmp_path, SnapshotEnsemble(2), max_epochs=-1)
