"""LRDecay in real trainers, against closed forms, schedulers of the user's own and uninterrupted runs."""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from support import trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_structopt.lr_decay import LRDecay
from lightning_structopt.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    MultiStep,
    Polynomial,
    Schedule,
    Step,
    Warmup,
)

# These resume without the callback that saved.
pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")

BATCHES = 4
BASES = [0.1, 0.02]


class Two(pl.LightningModule):
    """Two layers with their own learning rates; remembers the rates that each batch met."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)
        self.rates: list[list[float]] = []
        self.epochs: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        self.rates.append([group["lr"] for o in self.trainer.optimizers for group in o.param_groups])
        self.epochs.append(self.current_epoch)
        return self.second(self.first(batch[0])).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def groups(self) -> list[dict[str, Any]]:
        layers = (self.first, self.second)
        return [{"params": x.parameters(), "lr": lr} for x, lr in zip(layers, BASES, strict=True)]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.groups())


class Manual(Two):
    """An optimizer for each layer: the first steps once a batch, the second twice at odd batches."""

    def __init__(self, raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw
        self.stepped: list[list[float]] = [[], []]  # the rates that each optimizer stepped with

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        if batch_idx % 2:
            second.step()
            second.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD([group]) for group in self.groups()]
        for optimizer, stepped in zip(optimizers, self.stepped, strict=True):
            optimizer.register_step_pre_hook(lambda o, *_, s=stepped: s.append(o.param_groups[0]["lr"]))
        return optimizers


class WithScheduler(Two):
    """What a user writes who does without LRDecay."""

    def __init__(self, schedule: Schedule, horizon: float, interval: str) -> None:
        super().__init__()
        self.factor = lambda t: schedule(t, horizon)
        self.interval = interval

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class SaveEverywhere(Checkpoint):
    """Saves a checkpoint wherever ``ModelCheckpoint`` could."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def save(self, trainer: pl.Trainer, where: str) -> None:
        self.paths.append(self.folder / f"{len(self.paths):02d}-{where}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.save(trainer, "epoch")


def data(batches: int = BATCHES) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(4.0 * batches).view(-1, 2) / batches), batch_size=2)


def fit(
    root: Path, module: Two, *callbacks: Callback, val: bool = False, ckpt: Path | None = None, **kwargs: Any
) -> list[list[float]]:
    """Train for 3 epochs of 4 batches and return the rates of each batch."""
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    runner = trainer(root, *callbacks, **{"max_epochs": 3, "enable_checkpointing": saves, **kwargs})
    runner.fit(module, data(), data(1) if val else None, ckpt_path=ckpt)
    return module.rates


def expected(schedule: Schedule, positions: list[float], horizon: float) -> list[list[float]]:
    return [[base * schedule(t, horizon) for base in BASES] for t in positions]


# ---- the rates of one run


@pytest.mark.parametrize(
    "schedule",
    [
        Constant(),
        Linear(),
        Polynomial(power=2.0),
        Exponential(gamma=0.8),
        Step(step_size=2),
        MultiStep(milestones=(1, 2)),
        Cosine(minimum=0.1),
        Warmup(steps=2, then=Cosine(), start=0.1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_rates_follow_the_schedule_in_every_group(tmp_path, schedule, interval):
    rates = fit(tmp_path, Two(), LRDecay(schedule, interval))
    positions = [batch if interval == "step" else batch // BATCHES for batch in range(3 * BATCHES)]
    assert rates == expected(schedule, positions, 3 * BATCHES if interval == "step" else 3)


def test_equals_a_scheduler_of_torch(tmp_path):
    class WithTorch(Two):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = lr_scheduler.PolynomialLR(optimizer, total_iters=3 * BATCHES, power=2.0)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    one, other = Two(), WithTorch()
    rates = fit(tmp_path, one, LRDecay(Polynomial(power=2.0)))
    assert torch.tensor(rates).allclose(torch.tensor(fit(tmp_path, other)))
    assert torch.allclose(one.first.weight, other.first.weight)


@pytest.mark.parametrize(
    ("kwargs", "callbacks", "positions"),
    [
        ({"accumulate_grad_batches": 3}, [], [0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4, 5]),
        ({}, [GradientAccumulationScheduler({1: 2})], [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
    ],
    ids=["fixed", "scheduled"],
)
def test_a_step_is_an_optimizer_step(tmp_path, kwargs, callbacks, positions):
    rates = fit(tmp_path, Two(), LRDecay(Linear()), *callbacks, **kwargs)
    assert rates == expected(Linear(), positions, positions[-1] + 1)


def test_the_horizon_is_where_max_steps_ends_training(tmp_path):
    assert fit(tmp_path, Two(), LRDecay(Linear()), max_steps=6) == expected(Linear(), list(range(6)), 6)
    epochs = fit(tmp_path, Two(), LRDecay(Linear(), "epoch"), max_steps=6)
    assert epochs == expected(Linear(), [0, 0, 0, 0, 1, 1], 1.5)


def test_horizon_of_your_own(tmp_path):
    rates = fit(tmp_path, Two(), LRDecay(Linear(end=0.5), horizon=5), max_epochs=2)
    assert rates == expected(Linear(end=0.5), list(range(8)), 5)
    assert rates[5] == rates[7] == [0.05, 0.01]
    rates = fit(tmp_path, Two(), LRDecay(Linear(), "epoch", horizon=8), max_epochs=-1, max_steps=8)
    assert rates == expected(Linear(), [0] * 4 + [1] * 4, 8)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(torch.ones(BATCHES, 1, 1, 2))


def test_a_loader_without_a_length(tmp_path):
    for decay in (LRDecay(Linear(), "epoch"), LRDecay(Linear(), horizon=12), LRDecay(Linear())):
        module = Two()
        limit = {"max_steps": 12} if repr(decay) == repr(LRDecay(Linear())) else {}
        trainer(tmp_path, decay, max_epochs=3, **limit).fit(module, DataLoader(Stream(), batch_size=None))
        epochs = decay.interval == "epoch"
        assert module.rates == expected(
            Linear(), [b // 4 if epochs else b for b in range(12)], 3 if epochs else 12
        )


@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_an_epoch_that_lightning_could_not_foresee_the_end_of(tmp_path):
    class Iterates(Two):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return self.loss(next(dataloader_iter)[0])

    module = Iterates()
    runner = trainer(tmp_path, LRDecay(Linear(), "epoch"), max_epochs=3)
    runner.fit(module, DataLoader(Stream(), batch_size=None))
    assert module.rates == expected(Linear(), [b // 4 for b in range(12)], 3)


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_batches_that_are_skipped_are_no_steps(tmp_path):
    def second_is_none(samples: Any) -> Any:
        return None if samples[0][0][0] == 1 else [torch.stack([sample[0] for sample in samples])]

    class SkipsRestOfEpoch(Two):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    loader = DataLoader(data().dataset, batch_size=2, collate_fn=second_is_none)
    module = Two()
    trainer(tmp_path, LRDecay(Exponential(gamma=0.5)), max_epochs=2).fit(module, loader)
    assert module.rates == expected(Exponential(gamma=0.5), list(range(6)), 8)

    rates = fit(tmp_path, SkipsRestOfEpoch(), LRDecay(Exponential(gamma=0.5)))
    assert rates == expected(Exponential(gamma=0.5), list(range(6)), 12)


def test_tensor_rates_stay_the_same_tensor(tmp_path):
    class TensorRate(Two):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.1)
            return torch.optim.Adam(self.parameters(), lr=self.rate)

    module = TensorRate()
    fit(tmp_path, module, LRDecay(Linear(end=0.5)))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] is module.rate
    assert module.rate.item() == pytest.approx(0.05)


# ---- manual optimization


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimizers_count_their_own_steps(tmp_path, raw):
    module = Manual(raw=raw)
    fit(tmp_path, module, LRDecay(Linear(), horizon=12))
    assert module.stepped == [[base * Linear()(t, 12) for t in range(12)] for base in BASES]
    assert [rate for _, rate in module.rates][:4] == [0.02 * Linear()(t, 12) for t in (0, 0, 2, 2)]


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimizers_share_the_epochs(tmp_path, raw):
    module = Manual(raw=raw)
    fit(tmp_path, module, LRDecay(Linear(), "epoch"))
    assert module.stepped == [[base * Linear()(t // BATCHES, 3) for t in range(12)] for base in BASES]


def test_hooks_do_not_outlive_the_fit(tmp_path):
    class Fails(Manual):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                raise RuntimeError("on purpose")

    for module in (Manual(), Fails()):
        decay = LRDecay(Exponential(gamma=0.5))
        runner = trainer(tmp_path, decay, max_epochs=2)
        if isinstance(module, Fails):
            with pytest.raises(RuntimeError, match="on purpose"):
                runner.fit(module, data())
        else:
            runner.fit(module, data())
        optimizer = runner.optimizers[0]
        before = optimizer.param_groups[0]["lr"]
        assert before < 0.1
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == before
        assert not optimizer._optimizer_step_post_hooks


# ---- resume equals straight

RUNS = {
    "plain": {},
    "validation": {"val": True},
    "validation within the epoch": {"val": True, "val_check_interval": 2},
    "validation every other epoch": {"val": True, "check_val_every_n_epoch": 2},
    "accumulation": {"accumulate_grad_batches": 3},
    "steps": {"max_epochs": -1, "max_steps": 10, "val": True},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_resume_equals_straight(tmp_path, run, interval):
    decay, save = LRDecay(Polynomial(power=1.5), interval), SaveEverywhere(tmp_path)
    straight = fit(tmp_path, Two(), decay, save, **RUNS[run])
    assert len({tuple(rates) for rates in straight}) >= 3
    for path in save.paths:
        resumed = fit(tmp_path, Two(), LRDecay(Polynomial(power=1.5), interval), ckpt=path, **RUNS[run])
        batches = torch.load(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert resumed == straight[batches:], path.name


@pytest.mark.parametrize("run", ["plain", "validation", "validation within the epoch"])
@pytest.mark.parametrize(
    "decay",
    [LRDecay(Linear(), horizon=12), LRDecay(Exponential(gamma=0.9)), LRDecay(Linear(), "epoch")],
    ids=repr,
)
def test_resume_equals_straight_under_manual_optimization(tmp_path, run, decay):
    save = SaveEverywhere(tmp_path)
    straight = fit(tmp_path, Manual(), decay, save, **RUNS[run])
    for path in save.paths:
        resumed = fit(tmp_path, Manual(), copy.deepcopy(decay), ckpt=path, **RUNS[run])
        batches = torch.load(path)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
        assert resumed == straight[batches:], path.name


def test_lightning_resuming_under_max_steps_at_the_end_of_an_epoch(tmp_path):
    # It adds one batch to the epoch that is over and steps the schedulers after it. The rate is that of the
    # next epoch by then, and goes on with the trainer's epochs, instead of running one epoch ahead of them.
    limits = {"max_epochs": -1, "max_steps": 12}
    save = SaveEverywhere(tmp_path)
    straight = fit(tmp_path, Two(), LRDecay(Linear(), "epoch"), save, **limits)
    path = next(path for path in save.paths if "epoch" in path.stem)
    module = Two()
    resumed = fit(tmp_path, module, LRDecay(Linear(), "epoch"), ckpt=path, **limits)
    assert resumed[0] == straight[4]
    assert resumed[1:] == expected(Linear(), module.epochs[1:], 3)
    assert fit(tmp_path, Two(), LRDecay(Linear()), ckpt=path, **limits) == expected(
        Linear(), list(range(4, 12)), 12
    )


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_model_checkpoint_of_an_epoch(tmp_path, on_train_epoch_end):
    keep = ModelCheckpoint(
        tmp_path / "kept", "{epoch}", save_top_k=-1, save_on_train_epoch_end=on_train_epoch_end
    )
    straight = fit(tmp_path, Two(), LRDecay(Linear(), "epoch"), keep, val=True)
    for epoch in (0, 1):
        path = tmp_path / "kept" / f"epoch={epoch}.ckpt"
        resumed = fit(tmp_path, Two(), LRDecay(Linear(), "epoch"), val=True, ckpt=path)
        assert resumed == straight[BATCHES * (epoch + 1) :]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_resume_after_an_exception_anywhere(tmp_path, interval):
    class Killed(Two):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.current_epoch == 1 and batch_idx == 2:
                self.trainer.save_checkpoint(tmp_path / "killed.ckpt")
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    straight = fit(tmp_path, Two(), LRDecay(Linear(), interval))
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, Killed(), LRDecay(Linear(), interval))
    resumed = fit(tmp_path, Two(), LRDecay(Linear(), interval), ckpt=tmp_path / "killed.ckpt")
    assert resumed == straight[-len(resumed) :]
    assert len(resumed) >= 5


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_resume_into_a_longer_training_stretches_the_schedule_at_once(tmp_path, interval):
    save = SaveEverywhere(tmp_path)
    fit(tmp_path, Two(), LRDecay(Linear(), interval), save, max_epochs=2)
    resumed = fit(tmp_path, Two(), LRDecay(Linear(), interval), ckpt=save.paths[-1], max_epochs=4)
    positions = list(range(8, 16)) if interval == "step" else [2] * 4 + [3] * 4
    assert resumed == expected(Linear(), positions, 16 if interval == "step" else 4)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("theirs", [None, lr_scheduler.StepLR, lr_scheduler.LambdaLR])
def test_resume_from_a_checkpoint_made_without_it(tmp_path, interval, theirs):
    class Theirs(Two):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            argument = 1 if theirs is lr_scheduler.StepLR else (lambda t: 0.1**t)
            return ([optimizer], [theirs(optimizer, argument)]) if theirs else optimizer

    save = SaveEverywhere(tmp_path)
    fit(tmp_path, Theirs(), save)
    resumed = fit(
        tmp_path, Two(), LRDecay(Linear(), interval), ckpt=save.paths[6]
    )  # in epoch 1, after 2 batches
    positions = range(6, 12) if interval == "step" else [1] * 2 + [2] * 4
    assert resumed == expected(Linear(), list(positions), 12 if interval == "step" else 3)


def test_a_checkpoint_goes_on_with_a_scheduler_of_the_users_own(tmp_path):
    straight, save = Two(), SaveEverywhere(tmp_path)
    rates = fit(tmp_path, straight, LRDecay(Linear(), "epoch"), save)
    resumed = fit(tmp_path, WithScheduler(Linear(), 3, "epoch"), ckpt=save.paths[4])
    assert resumed == rates[4:]


def test_checkpoint_is_what_a_scheduler_of_the_users_own_saves(tmp_path):
    mine, theirs = SaveEverywhere(tmp_path / "mine"), SaveEverywhere(tmp_path / "theirs")
    fit(tmp_path, Two(), LRDecay(Linear(), "epoch"), mine, val=True)
    fit(tmp_path, WithScheduler(Linear(), 3, "epoch"), theirs, val=True)
    for one, other in zip(mine.paths, theirs.paths, strict=True):
        saved = [torch.load(path, weights_only=True)["lr_schedulers"][0] for path in (one, other)]
        for state in saved:
            state.pop("_step_count")
        assert saved[0] == saved[1]
        assert saved[0]["lr_lambdas"] == [None, None]


def test_a_stateful_loader_is_restored(tmp_path):
    class Sees(Two):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    def run(module: Sees, *callbacks: Callback, ckpt: Path | None = None) -> Sees:
        loader = StatefulDataLoader(data().dataset, batch_size=2)
        runner = trainer(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=ckpt is None)
        runner.fit(module, loader, ckpt_path=ckpt)
        return module

    save = SaveEverywhere(tmp_path)
    straight = run(Sees(), LRDecay(Linear()), save)
    resumed = run(Sees(), LRDecay(Linear()), ckpt=save.paths[1])
    assert resumed.seen == straight.seen[2:]
    assert resumed.rates == straight.rates[2:]
    assert torch.equal(resumed.first.weight, straight.first.weight)


# ---- one callback, several fits


every_kind = pytest.mark.parametrize(
    ("module", "decay"),
    [
        (Two, LRDecay(Linear())),
        (Two, LRDecay(Linear(), "epoch")),
        (Manual, LRDecay(Linear(), horizon=16)),
        (Manual, LRDecay(Linear(), "epoch")),
    ],
    ids=["steps", "epochs", "manual steps", "manual epochs"],
)


@every_kind
def test_fit_twice_with_new_trainers(tmp_path, module, decay):
    decay = copy.copy(decay)
    assert fit(tmp_path, module(), decay) == fit(tmp_path, module(), decay)
    rates = fit(tmp_path, module(), decay, max_epochs=2)
    assert rates == fit(tmp_path, module(), copy.copy(decay), max_epochs=2)


@every_kind
def test_fit_again_with_the_same_trainer_goes_on(tmp_path, module, decay):
    straight = fit(tmp_path, module(), copy.deepcopy(decay), max_epochs=4)
    model, runner = module(), trainer(tmp_path, decay, max_epochs=2)
    runner.fit(model, data())
    runner.validate(model, data(1), verbose=False)
    runner.fit_loop.max_epochs = 4
    runner.fit(model, data())
    assert model.rates[8:] == straight[8:]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_validate_and_test_without_fit(tmp_path, interval):
    runner = trainer(tmp_path, LRDecay(Linear(), interval))
    runner.validate(Two(), data(1), verbose=False)
    runner.test(Two(), data(1), verbose=False)
    assert not runner.lr_scheduler_configs


@pytest.mark.parametrize("module", [Two, Manual])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_fast_dev_run(tmp_path, module, interval):
    horizon = 12 if module is Manual and interval == "step" else None
    assert fit(tmp_path, module(), LRDecay(Linear(), interval, horizon), fast_dev_run=True) == [BASES]


# ---- with other callbacks


def test_learning_rate_monitor_names_and_values(tmp_path):
    logged = {}
    for name, module in (("one", Two()), ("two", Manual())):
        monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path, name)
        decay = LRDecay(Exponential(gamma=0.5))
        fit(tmp_path, module, monitor, decay, logger=logger, log_every_n_steps=1)
        logged[name] = monitor.lrs
        assert (Path(logger.log_dir) / "metrics.csv").read_text().count("\n") == 13
    assert list(logged["one"]) == ["lr-SGD/pg1", "lr-SGD/pg2"]
    assert list(logged["two"]) == ["lr-SGD", "lr-SGD-1"]
    assert logged["one"]["lr-SGD/pg2"] == [0.02 * 0.5**t for t in range(12)]
    assert logged["two"]["lr-SGD-1"] == [0.02 * 0.5 ** (t // 2 * 2) for t in range(12)]


@pytest.mark.parametrize("module", [Two, Manual])
def test_learning_rate_monitor_of_epochs(tmp_path, module):
    monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path)
    fit(tmp_path, module(), monitor, LRDecay(Linear(), "epoch"), logger=logger, log_every_n_steps=1)
    assert list(monitor.lrs.values())[0] == [0.1 * Linear()(t, 3) for t in range(3)]


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_takes_over_as_from_a_scheduler_of_the_users_own(tmp_path, interval, first):
    schedule, settings = Exponential(gamma=0.8), {"max_epochs": 5}

    def averaging() -> StochasticWeightAveraging:
        return StochasticWeightAveraging(swa_lrs=0.003, swa_epoch_start=3, annealing_epochs=2)

    def ours() -> list[Callback]:
        pair = [LRDecay(schedule, interval), averaging()]
        return pair if first else pair[::-1]

    theirs = WithScheduler(schedule, 1, interval)
    save, save_theirs = SaveEverywhere(tmp_path / "ours"), SaveEverywhere(tmp_path / "theirs")
    rates = fit(tmp_path, Two(), *ours(), save, **settings)
    assert rates == fit(tmp_path, theirs, averaging(), save_theirs, **settings)
    assert rates[-1] == [0.003, 0.003]
    for path, path_theirs in zip(save.paths[4::5], save_theirs.paths[4::5], strict=True):  # ends of epochs
        resumed = fit(tmp_path, Two(), *ours(), ckpt=path, **settings)
        theirs = WithScheduler(schedule, 1, interval)
        assert resumed == fit(tmp_path, theirs, averaging(), ckpt=path_theirs, **settings)


def test_decays_again_after_a_fit_that_weight_averaging_took_over(tmp_path):
    decay, save = LRDecay(Linear(), "epoch"), SaveEverywhere(tmp_path)
    averaging = StochasticWeightAveraging(swa_lrs=0.003, swa_epoch_start=2)
    fit(tmp_path, Two(), decay, averaging, save)
    averaging = StochasticWeightAveraging(swa_lrs=0.003, swa_epoch_start=2)
    fit(tmp_path, Two(), decay, averaging, ckpt=save.paths[-1], max_epochs=4)
    assert fit(tmp_path, Two(), decay) == expected(Linear(), [b // BATCHES for b in range(12)], 3)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_hooks_rest_once_weight_averaging_took_over(tmp_path):
    class OneManual(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.groups())

    averaging = StochasticWeightAveraging(swa_lrs=0.003, swa_epoch_start=2, annealing_epochs=1)
    rates = fit(tmp_path, OneManual(), LRDecay(Exponential(gamma=0.5)), averaging)
    assert rates[:4] == expected(Exponential(gamma=0.5), list(range(4)), 1)
    assert len({tuple(each) for each in rates[4:]}) == 1


# ---- errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LRDecay(Exponential), TypeError, r"`schedule` must be a `Schedule`.*`Exponential\(\)`"),
        (lambda: LRDecay(0.9), TypeError, "`schedule` must be a `Schedule`. Found `schedule = 0.9`"),
        (lambda: LRDecay(Linear(), interval="batch"), ValueError, "`interval` must be 'step' or 'epoch'"),
        (lambda: LRDecay(Linear(), horizon=0), ValueError, "`horizon` must be at least 1"),
        (lambda: LRDecay(Linear(), horizon=float("nan")), TypeError, "`horizon` must be a whole number"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def assert_refused(
    root: Path, module: Two, *callbacks: Callback, match: str, loader: Any = None, **kwargs: Any
):
    with pytest.raises(ValueError, match=match):
        trainer(root, *callbacks, **{"max_epochs": 3, **kwargs}).fit(
            module, data() if loader is None else loader
        )
    assert module.rates == []


@pytest.mark.parametrize("scheduler", [lr_scheduler.StepLR, lr_scheduler.ReduceLROnPlateau])
def test_a_scheduler_of_the_module_is_refused(tmp_path, scheduler):
    class Scheduled(Two):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            made = scheduler(optimizer, **({"step_size": 2} if scheduler is lr_scheduler.StepLR else {}))
            return {"optimizer": optimizer, "lr_scheduler": made, "monitor": "loss"}

    assert_refused(
        tmp_path,
        Scheduled(),
        LRDecay(Linear()),
        match=f"one owner. Found `LRDecay` and a `{scheduler.__name__}`",
    )


def test_two_callbacks_are_refused(tmp_path):
    pair = LRDecay(Linear()), LRDecay(Exponential(gamma=0.9), "epoch")
    assert_refused(tmp_path, Two(), *pair, match=r"one `LRDecay`. Found \[LRDecay.*Warmup")


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None.")
@pytest.mark.parametrize("optimizers", [None, []])
def test_no_optimizer_is_refused(tmp_path, optimizers):
    class Without(Two):
        def configure_optimizers(self) -> Any:
            return optimizers

    assert_refused(tmp_path, Without(), LRDecay(Linear()), match="needs optimizers with learning rates")


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_endless_training_is_refused(tmp_path, interval):
    match = r"`Warmup\(.*\)` needs to know when training ends. Found `max_epochs = -1`"
    decay = LRDecay(Warmup(steps=2, then=Cosine()), interval)
    assert_refused(tmp_path, Two(), decay, match=match, max_epochs=-1)


@pytest.mark.parametrize(
    ("interval", "kwargs", "remedy"),
    [("step", {}, 'interval="epoch"'), ("epoch", {"max_epochs": -1, "max_steps": 12}, 'interval="step"')],
)
def test_a_loader_without_a_length_is_refused(tmp_path, interval, kwargs, remedy):
    match = f"how many {interval}s training takes. Found a loader without a length. Give `LRDecay` .*{remedy}"
    loader = DataLoader(Stream(), batch_size=None)
    assert_refused(tmp_path, Two(), LRDecay(Linear(), interval), match=match, loader=loader, **kwargs)


def test_a_horizon_in_unknown_manual_steps_is_refused(tmp_path):
    match = "how many steps each optimizer takes. Found manual optimization.*`horizon` or .interval=.epoch"
    assert_refused(tmp_path, Manual(), LRDecay(Linear()), match=match)


@pytest.mark.parametrize("module", [Two, Manual])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_without_a_horizon_needs_none(tmp_path, module, interval):
    class StopAfterTwoEpochs(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    decay = LRDecay(Warmup(steps=2, then=Exponential(gamma=0.5)), interval)
    rates = fit(tmp_path, module(), decay, StopAfterTwoEpochs(), max_epochs=-1)
    first = [0, 0.5, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125] if interval == "step" else [0] * 4 + [0.5] * 4
    assert [each[0] for each in rates] == [0.1 * factor for factor in first]


def test_the_other_lightning_is_refused(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel

    decay = LRDecay(Linear())
    runner = other.Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[decay], barebones=True)
    with pytest.raises(TypeError, match="`LRDecay` is built on the package `lightning`"):
        runner.fit(BoringModel())


# ---- a value like any other


@pytest.mark.parametrize(
    "decay",
    [LRDecay(Exponential(gamma=0.95), interval="epoch"), LRDecay(Linear()), LRDecay(Linear(), horizon=7)],
    ids=repr,
)
def test_repr_and_pickle_round_trip(tmp_path, decay):
    assert repr(eval(repr(decay))) == repr(decay)
    for module in (Two(), Manual()):
        if not isinstance(module, Manual) or decay.horizon or not decay.schedule.needs_horizon:
            fit(tmp_path, module, decay)
        for twin in (pickle.loads(pickle.dumps(decay)), copy.deepcopy(decay), copy.copy(decay)):
            assert repr(twin) == repr(decay)
            assert vars(twin) == vars(type(decay)(decay.schedule, decay.interval, decay.horizon))


def test_repr_is_as_one_writes_it():
    text = "LRDecay(Exponential(gamma=0.95), interval='epoch')"
    assert repr(LRDecay(Exponential(gamma=0.95), "epoch")) == text


def test_can_be_pickled_in_the_middle_of_training(tmp_path):
    class Pickles(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            decay = next(callback for callback in trainer.callbacks if isinstance(callback, LRDecay))
            assert repr(pickle.loads(pickle.dumps(decay))) == repr(decay)

    fit(tmp_path, Manual(), LRDecay(Linear(), horizon=12), Pickles())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of `instantiate_classes`
def test_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callbacks", type=list[Callback])
    (tmp_path / "config.yaml").write_text(
        """
        callbacks:
          - class_path: lightning_structopt.lr_decay.LRDecay
            init_args:
              interval: epoch
              schedule:
                class_path: lightning_structopt.schedules.Warmup
                init_args:
                  steps: 2
                  then:
                    class_path: lightning_structopt.schedules.MultiStep
                    init_args: {milestones: [3, 5], gamma: 0.5}
        """
    )
    config = parser.parse_args([f"--config={tmp_path / 'config.yaml'}"])
    (decay,) = parser.instantiate_classes(config).callbacks
    schedule = Warmup(steps=2, then=MultiStep(milestones=(3, 5), gamma=0.5))
    assert repr(decay) == repr(LRDecay(schedule, interval="epoch"))
