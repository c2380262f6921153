"""What every LightningModule of ours promises. A new one registers in `MODULES` and nothing else."""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import CLASSES, FEATURES, Classifier, adamw, assert_same_state, loader, trainer
from torch import nn

import lightning_structopt as so

Make = Callable[[], pl.LightningModule]
MODULES: dict[str, Make] = {
    "DistillationModule, logits": lambda: so.DistillationModule(Classifier(seed=5), Classifier(adamw)),
    "DistillationModule, features": lambda: so.DistillationModule(
        Classifier(hidden=24, seed=5),
        Classifier(adamw),
        {"logits": so.DKD(), ("net.0", "net.0"): (0.5, so.Hint())},
        weight=0.3,
        schedule=so.Linear(),
    ),
    "DistillationModule, average": lambda: so.DistillationModule(so.EMATeacher(0.9), Classifier(adamw)),
    "MutualDistillation": lambda: so.MutualDistillation([Classifier(adamw), Classifier(adamw, seed=2)]),
    "ParallelEnsemble, together": lambda: so.ParallelEnsemble(members(), "learned", train_members=True),
    "SerialEnsemble, chain": lambda: so.SerialEnsemble(members(), mode="chain"),
    "ParallelEnsemble, weights": lambda: so.ParallelEnsemble(members(), "learned"),
    "MixedEnsemble, stacking": lambda: so.MixedEnsemble(members(), seeded(2 * CLASSES, CLASSES)),
    "MixedEnsemble, gating": lambda: so.MixedEnsemble(members(), so.GatingNetwork(seeded(FEATURES, 2))),
}


def members() -> list[pl.LightningModule]:
    return [Classifier(adamw), Classifier(adamw, seed=2)]


def seeded(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs)


every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(root: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    ckpt = kwargs.pop("ckpt", None)
    run = trainer(root, *callbacks, **kwargs)
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


def test_every_exported_module_is_registered() -> None:
    exported = {
        name
        for name in so.__all__
        if inspect.isclass(found := getattr(so, name)) and issubclass(found, pl.LightningModule)
    }
    assert exported == {type(make()).__name__ for make in MODULES.values()}


@every_module
def test_resume_equals_straight(make: Make, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    straight = fit(tmp_path, make(), saved)
    for epoch in range(3):
        resumed = fit(tmp_path, make(), ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())


@every_module
def test_checkpoints_load_safely(make: Make, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fit(tmp_path, make(), saved)
    checkpoint = torch.load(saved.last_model_path, weights_only=True)
    assert checkpoint["state_dict"].keys() == make().state_dict().keys()


@every_module
def test_fit_twice_goes_on(make: Make, tmp_path: Path) -> None:
    module = make()
    for _ in range(2):
        assert fit(tmp_path, module, max_epochs=2).global_step > 0


@every_module
def test_fast_dev_run(make: Make, tmp_path: Path) -> None:
    fit(tmp_path, make(), fast_dev_run=True)


@every_module
def test_validate_and_predict_without_fit(make: Make, tmp_path: Path) -> None:
    module = make()
    before = copy.deepcopy(module.state_dict())
    run = trainer(tmp_path)
    run.validate(module, loader(), verbose=False)
    run.predict(module, loader())
    assert_same_state(module.state_dict(), before)


@every_module
def test_can_be_copied_and_pickled(make: Make, tmp_path: Path) -> None:
    module = make()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same_state(dict(twin.state_dict()), dict(module.state_dict()))
        fit(tmp_path, twin, max_epochs=1)


@every_module
def test_prunes_and_decays_like_any_other(make: Make, tmp_path: Path) -> None:
    pruning = so.IterativePruning(0.8, verbose=False)
    module = make()
    run = fit(tmp_path, module, pruning, so.LRDecay(so.Exponential(0.9)))
    weights = dict(run.lightning_module.named_parameters())
    assert pruning.sparsity == pytest.approx(0.8, abs=0.01)
    for name, mask in pruning.masks.items():
        assert not weights[name][~mask].any()
