"""What every callback promises. A new one registers in `CALLBACKS` and nothing else."""

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
from lightning.pytorch.cli import LightningCLI
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, trainer

import lightning_structopt as so

Make = Callable[[], pl.Callback]
CALLBACKS: dict[str, Make] = {
    "IterativePruning, epochs": lambda: so.IterativePruning(0.8, verbose=False),
    "IterativePruning, steps": lambda: so.IterativePruning(
        0.8,
        criterion=so.Magnitude(p=2),
        pattern=so.Unstructured(scope="layer"),
        ramp=so.OneCycleRamp(),
        interval="step",
        every=2,
        include=["net.0.*", torch.nn.Linear],
        exclude="net.3.*",
        verbose=False,
    ),
    "IterativePruning, gradients": lambda: so.IterativePruning(
        0.8, criterion=so.Taylor(), begin=0.0, interval="step", every=3, verbose=False
    ),
    "IterativePruning, movement": lambda: so.IterativePruning(0.8, criterion=so.Movement(), verbose=False),
    "IterativePruning, inputs": lambda: so.IterativePruning(
        0.5, criterion=so.Wanda(), pattern=so.NByM(2, 4), verbose=False
    ),
    "IterativePruning, rewinding": lambda: so.IterativePruning(
        0.8, begin=0.3, rewind=so.RewindWeights(to=0.25), verbose=False
    ),
    "IterativePruning, regrowth": lambda: so.IterativePruning(
        0.8,
        criterion=so.Random(seed=0),
        pattern=so.Unstructured("layer", so.ErdosRenyi()),
        interval="step",
        regrow=so.RigL(every=3),
        verbose=False,
    ),
    "SparsityPenalty, proximal": lambda: so.SparsityPenalty(
        so.L1(1e-2), schedule=so.Warmup(5, then=so.Constant())
    ),
    "SparsityPenalty, gradient": lambda: so.SparsityPenalty(
        so.GroupLasso(1e-2, groups="channel"), mode="gradient", include="net.0.*"
    ),
    "LRDecay, steps": lambda: so.LRDecay(so.Warmup(3, then=so.Cosine(minimum=0.1))),
    "LRDecay, epochs": lambda: so.LRDecay(so.Polynomial(power=2.0), interval="epoch"),
    "CostMonitor": so.CostMonitor,
    "LRDecay, horizon": lambda: so.LRDecay(so.Linear(), horizon=9),
    "ChannelPruning, epochs": lambda: so.ChannelPruning(so.ChannelRatio(0.5), verbose=False),
    "ChannelPruning, steps": lambda: so.ChannelPruning(
        so.Parameters(0.6), criterion=so.Taylor(), interval="step", every=2, remove="never", verbose=False
    ),
    "ChannelPruning, rewinding": lambda: so.ChannelPruning(
        so.ChannelRatio(0.5), begin=0.3, rewind=so.RewindWeights(to=0.25), verbose=False
    ),
    "SnapshotEnsemble": lambda: so.SnapshotEnsemble(cycles=2, minimum=0.1),
    "NetworkGrowth": lambda: so.NetworkGrowth(
        so.Plateau("train_loss", patience=9), deepen=so.Deepen(kind="residual"), verbose=False
    ),
    "ActivationCheck": lambda: so.ActivationCheck(every=3),
    "AdaptiveReport": lambda: so.AdaptiveReport(verbose=False),
}
every_callback = pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def fit(root: Path, callback: pl.Callback, *more: pl.Callback, ckpt: Any = None, **kwargs: Any) -> pl.Trainer:
    run = trainer(root, callback, *more, **kwargs)
    run.fit(Classifier(adamw), loader(), loader(), ckpt_path=ckpt)
    return run


def names(kind: type) -> set[str]:
    return {
        name for name in so.__all__ if inspect.isclass(found := getattr(so, name)) and issubclass(found, kind)
    }


def test_every_exported_callback_is_registered() -> None:
    assert names(pl.Callback) == {type(make()).__name__ for make in CALLBACKS.values()}


@every_callback
def test_resume_equals_straight(make: Make, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    straight = fit(tmp_path, make(), saved)
    for epoch in range(3):
        resumed = fit(tmp_path, make(), ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())


@every_callback
def test_checkpoints_hold_the_users_keys_and_load_safely(make: Make, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    fit(tmp_path, make(), saved)
    checkpoint = torch.load(saved.last_model_path, weights_only=True)
    assert checkpoint["state_dict"].keys() == Classifier().state_dict().keys()
    Classifier.load_from_checkpoint(saved.last_model_path)


@every_callback
def test_setup_twice_is_harmless(make: Make, tmp_path: Path) -> None:
    class Twice(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainer.callbacks[0].setup(trainer, pl_module, stage)

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            hooks.append(sum(len(o._optimizer_step_post_hooks) for o in trainer.optimizers))

    hooks: list[int] = []
    once = fit(tmp_path, make())
    twice = fit(tmp_path, make(), Twice())
    assert_same_state(twice.lightning_module.state_dict(), once.lightning_module.state_dict())
    assert hooks == [0]


@every_callback
def test_fit_twice_with_one_object(make: Make, tmp_path: Path) -> None:
    callback = make()
    first = fit(tmp_path, callback)
    second = fit(tmp_path, callback)
    assert_same_state(second.lightning_module.state_dict(), first.lightning_module.state_dict())
    assert not any(o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in second.optimizers)


@every_callback
def test_works_again_after_an_exception(make: Make, tmp_path: Path) -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("crash")

    callback = make()
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, callback, Crash())
    again = fit(tmp_path, callback)
    straight = fit(tmp_path, make())
    assert_same_state(again.lightning_module.state_dict(), straight.lightning_module.state_dict())


@every_callback
def test_pickles_and_copies_fresh_and_used(make: Make, tmp_path: Path) -> None:
    used = make()
    fit(tmp_path, used)
    for callback in (make(), used):
        for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
            assert repr(twin) == repr(callback)
            assert_same_state(twin.state_dict(), callback.state_dict())
            fit(tmp_path, twin)


@every_callback
def test_repr_round_trips(make: Make) -> None:
    callback = make()
    twin = eval(repr(callback), {**vars(so), "torch": torch})
    assert type(twin) is type(callback)
    assert repr(twin) == repr(callback)


@every_callback
def test_fast_dev_run(make: Make, tmp_path: Path) -> None:
    fit(tmp_path, make(), fast_dev_run=True)


@every_callback
def test_validate_test_and_predict_without_fit(make: Make, tmp_path: Path) -> None:
    run = trainer(tmp_path, make())
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    run.predict(module, loader())
    assert_same_state(module.state_dict(), before)


@every_callback
def test_manual_optimization_works_or_is_refused_at_once(make: Make, tmp_path: Path) -> None:
    module = ManualClassifier()
    module.training_step, seen = _counting(module.training_step)
    try:
        trainer(tmp_path, make()).fit(module, loader())
    except ValueError:
        assert seen == []


def _counting(step: Any) -> tuple[Any, list[int]]:
    seen: list[int] = []

    def training_step(batch: Any, batch_idx: int) -> Any:
        seen.append(batch_idx)
        return step(batch, batch_idx)

    return training_step, seen


@every_callback
def test_leaves_the_module_to_the_garbage_collector(make: Make, tmp_path: Path) -> None:
    import gc
    import weakref

    callback = make()
    gone = weakref.ref(fit(tmp_path, callback).lightning_module.net[0].weight)
    gc.collect()
    assert gone() is None


CONFIGURATIONS = {
    "IterativePruning": """
        - class_path: lightning_structopt.IterativePruning
          init_args:
            sparsity: 0.8
            criterion: {class_path: lightning_structopt.Magnitude, init_args: {p: 2}}
            pattern: {class_path: lightning_structopt.Unstructured, init_args: {scope: layer}}
            ramp: {class_path: lightning_structopt.OneCycleRamp, init_args: {steepness: 12.0}}
            interval: step
            include: ['net.*', torch.nn.Linear]
            verbose: false
    """,
    "SparsityPenalty": """
        - class_path: lightning_structopt.SparsityPenalty
          init_args:
            penalty: {class_path: lightning_structopt.GroupLasso, init_args: {strength: 0.01, groups: channel}}
            schedule: {class_path: lightning_structopt.Linear}
            exclude: net.3.*
    """,
    "CostMonitor": """
        - class_path: lightning_structopt.CostMonitor
    """,
    "LRDecay": """
        - class_path: lightning_structopt.LRDecay
          init_args:
            schedule:
              class_path: lightning_structopt.Warmup
              init_args:
                steps: 2
                then: {class_path: lightning_structopt.MultiStep, init_args: {milestones: [4, 8]}}
            interval: step
    """,
    "ChannelPruning": """
        - class_path: lightning_structopt.ChannelPruning
          init_args:
            target: {class_path: lightning_structopt.FLOPs, init_args: {keep: 0.5}}
            criterion: {class_path: lightning_structopt.Taylor, init_args: {p: 2}}
            verbose: false
    """,
    "SnapshotEnsemble": """
        - class_path: lightning_structopt.SnapshotEnsemble
          init_args: {cycles: 2, minimum: 0.1}
    """,
    "NetworkGrowth": """
        - class_path: lightning_structopt.NetworkGrowth
          init_args:
            when: {class_path: lightning_structopt.Plateau, init_args: {monitor: train_loss, patience: 1}}
            widen: {class_path: lightning_structopt.Widen, init_args: {factor: 1.5}}
            deepen: {class_path: lightning_structopt.Deepen}
            verbose: false
    """,
    "ActivationCheck": """
        - class_path: lightning_structopt.ActivationCheck
          init_args: {every: 3}
    """,
    "AdaptiveReport": """
        - class_path: lightning_structopt.AdaptiveReport
          init_args: {verbose: false}
    """,
}


def test_every_callback_has_a_configuration() -> None:
    assert set(CONFIGURATIONS) == names(pl.Callback)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()


class Configured(Classifier):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.filterwarnings("ignore")  # jsonargparse and pydantic deprecate each other's parts
def test_works_from_a_lightning_cli_configuration(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"""
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:{CONFIGURATIONS[name]}
"""
    )
    cli = LightningCLI(
        Configured, Data, save_config_callback=None, args=["fit", "--config", str(tmp_path / "config.yaml")]
    )
    assert type(cli.trainer.callbacks[0]).__name__ == name
    assert cli.trainer.global_step == 12
