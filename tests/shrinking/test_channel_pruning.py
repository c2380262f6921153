"""`ChannelPruning` in real training: the target is hit, what is gone stays zero, and removal changes nothing."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, sgd, trainer
from torch import Tensor, nn
from torchvision import models

from lightning_structopt.pruning import CubicRamp, IterativePruning, LinearRamp, OneShotRamp, Taylor, Wanda
from lightning_structopt.shrinking import (
    ChannelPruning,
    ChannelRatio,
    FLOPs,
    Latency,
    MaxBytes,
    Parameters,
    load_shrunk,
)


class Residual(pl.LightningModule):
    """A small ResNet whose channels can only go together."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
        self.drop = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.net(images))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2)


def images(samples: int = 8) -> torch.utils.data.DataLoader:
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(
        torch.randn(samples, 3, 32, 32, generator=generator), torch.arange(samples) % 4
    )
    return torch.utils.data.DataLoader(data, batch_size=4)


class Watch(pl.Callback):
    """Records what is left, and asserts after every batch that what is gone is zero, also in averages."""

    def __init__(self, pruning: ChannelPruning) -> None:
        self.pruning = pruning
        self.left: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
        for module in (pl_module, *(each.module for each in averages if hasattr(each, "module"))):
            assert_gone(module, self.pruning.state_dict()["kept"])
        self.left.append(self.pruning.left)


def assert_gone(module: nn.Module, kept: Any) -> None:
    parameters = dict(module.named_parameters())
    for name, dims in kept.items():
        for dim, indices in dims.items() if name in parameters else ():
            gone = sorted(set(range(parameters[name].shape[dim])) - set(indices))
            assert not parameters[name].index_select(dim, torch.tensor(gone)).any(), f"{name} was revived"


def quiet(target: Any = None, **kwargs: Any) -> ChannelPruning:
    given = {"begin": 0.2, "end": 0.8, "interval": "step", "verbose": False, **kwargs}
    return ChannelPruning(ChannelRatio(0.5) if target is None else target, **given)


def fit(
    root: Path, module: Any, pruning: ChannelPruning, *more: pl.Callback, data: Any = None, **kwargs: Any
) -> Watch:
    watch = Watch(pruning)
    # The watch comes last: averages are updated at the end of a batch.
    trainer(root, pruning, *more, watch, **kwargs).fit(module, loader() if data is None else data)
    return watch


def rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "scheduled accumulation": {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
    "clipping": {"gradient_clip_val": 0.5},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "EMA": {"callbacks": [EMAWeightAveraging(decay=0.8)]},
    "SWA": {"callbacks": [StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)]},
}


@pytest.mark.parametrize("optimizer", [sgd, adamw, rmsprop], ids=["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*bf16 is supported for historical reasons")
def test_what_is_gone_stays_zero(way: str, optimizer: Any, tmp_path: Path) -> None:
    arguments = dict(WAYS[way])
    module, pruning = Classifier(optimizer), quiet(remove="never")
    watch = fit(tmp_path, module, pruning, *arguments.pop("callbacks", []), **arguments)
    assert watch.left[-1] == pruning.left == 0.5
    assert len(pruning.state_dict()["kept"]["net.0.weight"][0]) == 8
    assert_gone(module, pruning.state_dict()["kept"])
    assert pruning.plan is None
    assert pruning.shrunk is None


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization(raw: bool, tmp_path: Path) -> None:
    module, pruning = ManualClassifier(raw=raw, optimizer=adamw), quiet(criterion=Taylor())
    watch = fit(tmp_path, module, pruning)
    assert watch.left[-1] == 0.5
    assert pruning.shrunk.net[0].out_features == 8


@pytest.mark.parametrize("ramp", [LinearRamp(), CubicRamp(), OneShotRamp()], ids=repr)
def test_what_is_left_follows_the_ramp(ramp: Any, tmp_path: Path) -> None:
    left = fit(tmp_path, Classifier(hidden=64), quiet(ramp=ramp, every=3, begin=0.25, end=0.75)).left
    first, last = 4, 10  # of 16 steps, three apart
    for step, found in enumerate(left):
        moment = min(step - (step - first) % 3, last)
        expected = 1.0 if step < first else 1 - ramp((moment - first) / (last - first), 0.5)
        assert found == pytest.approx(expected, abs=0.5 / 64), step


@pytest.mark.parametrize("target", [FLOPs(0.5), Parameters(0.4), ChannelRatio(0.25)], ids=repr)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_targets_are_hit_and_removal_changes_no_output(target: Any, scope: Any, tmp_path: Path) -> None:
    module, pruning = Residual(), quiet(target, scope=scope)
    fit(tmp_path, module, pruning, data=images(), max_epochs=3)
    assert pruning.left == pytest.approx(target.keep, abs=0.02)
    batch = torch.randn(5, 3, 32, 32)
    assert type(pruning.shrunk) is Residual
    for training in (True, False):  # training changes running statistics, alike in both
        torch.testing.assert_close(
            pruning.shrunk.train(training)(batch), module.train(training)(batch), rtol=1e-4, atol=1e-5
        )
    assert pruning.plan.is_done(pruning.shrunk)
    assert module.net.conv1.out_channels == 64


def test_so_many_bytes_and_no_more(tmp_path: Path) -> None:
    whole = sum(each.numel() * each.element_size() for each in Residual().state_dict().values())
    pruning = quiet(MaxBytes(whole // 3))
    fit(tmp_path, Residual(), pruning, data=images(), max_epochs=3)
    size = sum(each.numel() * each.element_size() for each in pruning.shrunk.state_dict().values())
    assert 0.97 * (whole // 3) < size <= whole // 3


def test_time_is_asked_once_and_becomes_operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_structopt.shrinking import start

    asked: list[Any] = []
    monkeypatch.setattr(start, "flops_for", lambda *args: asked.append(args) or 0.4)
    pruning = quiet(Latency(0.6), remove="never")
    fit(tmp_path, Residual(), pruning, data=images(), max_epochs=3)
    assert len(asked) == 1
    assert pruning.left == pytest.approx(0.4, abs=0.02)
    assert pruning.state_dict()["target_flops"] == 0.4


@pytest.mark.parametrize("criterion", [Taylor(), Wanda()], ids=repr)
@pytest.mark.parametrize("begin", [0.0, 0.3])
def test_criteria_that_learn_from_training(criterion: Any, begin: float, tmp_path: Path) -> None:
    module, pruning = Classifier(), quiet(criterion=criterion, begin=begin, remove="now")
    trainer(tmp_path, pruning, gradient_clip_val=1.0).fit(module, loader())
    assert module.net[0].out_features == 8


class TestExampleInputs:
    def test_given(self, tmp_path: Path) -> None:
        fit(tmp_path, Classifier(), quiet(example_input=torch.randn(3, 12)))

    def test_of_the_module(self, tmp_path: Path) -> None:
        module = Classifier()
        module.example_input_array = torch.randn(2, 12)
        watch = fit(tmp_path, module, quiet(), data=loader())
        assert watch.left[-1] == 0.5

    def test_of_a_batch_that_is_inputs_alone(self, tmp_path: Path) -> None:
        class Alone(Classifier):
            def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
                return self(batch).square().mean()

        data = torch.utils.data.DataLoader(torch.randn(16, 12), batch_size=4)
        assert fit(tmp_path, Alone(), quiet(), data=data).left[-1] == 0.5

    def test_keywords_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="a tuple of its arguments. Found `dict`. Give `example_input`"):
            fit(tmp_path, Classifier(), quiet(example_input={"inputs": torch.randn(3, 12)}))

    def test_that_do_not_run(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="runs on `example_input`"):
            fit(tmp_path, Classifier(), quiet(example_input=torch.randn(3, 13)))


class Untouched(Classifier):
    """Must not get to train."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("a training step was taken")


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


class TestRefused:
    @pytest.mark.parametrize(
        ("pruning", "match"),
        [
            (lambda: quiet(FLOPs(0.001)), r"`FLOPs\(keep=0.001\)` must be within reach. Found that 0\.\d+ is left"),
            (lambda: quiet(MaxBytes(100)), "must be within reach"),
            (lambda: quiet(ChannelRatio(0.2), minimum=12), "must be within reach"),
            (lambda: quiet(exclude=["nothing"]), "No parameter matches `exclude = 'nothing'`"),
            (lambda: quiet(exclude="*"), "Pruning channels needs some that can go. Found none"),
            (lambda: quiet(begin=0.32, end=0.37), "must hold at least one step"),
        ],
    )  # fmt: skip
    def test_before_the_first_step(self, pruning: Any, match: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=match):
            trainer(tmp_path, pruning()).fit(Untouched(), loader())

    def test_an_optimizer_that_revives(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Found `LBFGS`"):
            trainer(tmp_path, quiet()).fit(Untouched(lbfgs), loader())

    def test_two(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `ChannelPruning`"):
            trainer(tmp_path, quiet(), quiet(ChannelRatio(0.3)))

    def test_another_owner(self, tmp_path: Path) -> None:
        both = (IterativePruning(0.5, verbose=False), quiet())
        with pytest.raises(ValueError, match="both own `net.0.weight`"):
            trainer(tmp_path, *both).fit(Untouched(), loader())

    def test_no_end(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="which must have an end"):
            trainer(tmp_path, quiet(), max_epochs=-1).fit(Untouched(), loader())

    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"target": 0.5}, TypeError, "`target` must be a `Target`"),
            ({"criterion": Taylor}, TypeError, r"Did you mean `Taylor\(\)`"),
            ({"ramp": "cubic"}, TypeError, "`ramp` must be a `Ramp`"),
            ({"remove": "later"}, ValueError, "`remove` must be 'end' or 'now' or 'never'"),
            ({"interval": "batch"}, ValueError, "`interval` must be"),
            ({"scope": "all"}, ValueError, "`scope` must be"),
            ({"round_to": 0}, ValueError, "`round_to` must be at least 1"),
            ({"minimum": 0}, ValueError, "`minimum` must be at least 1"),
            ({"begin": 0.9}, ValueError, "`begin` must be less than `end`"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            quiet(arguments.pop("target", None), **{"end": 0.8, **arguments})

    def test_a_module_of_another_package(self, tmp_path: Path) -> None:
        other = pytest.importorskip("pytorch_lightning")
        with pytest.raises(TypeError, match="of the package `pytorch_lightning`"):
            quiet().setup(other.Trainer.__new__(other.Trainer), Classifier(), "fit")


def test_training_that_stops_early_says_so(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 4

    pruning = quiet(end=0.9)
    with pytest.warns(UserWarning, match="ended before the pruning window closed"):
        trainer(tmp_path, pruning, Stop()).fit(Classifier(), loader())
    assert pruning.shrunk is None
    assert pruning.plan is None


def test_a_second_fit_goes_on_with_what_is_gone(tmp_path: Path) -> None:
    module, pruning = Classifier(), quiet()
    fit(tmp_path, module, pruning)
    before = pruning.plan
    fit(tmp_path, module, pruning)
    assert pruning.plan == before
    fit(tmp_path, Classifier(seed=7), pruning)
    assert pruning.plan != before


class Noisy(Residual):
    """Draws numbers in training and in evaluation, and has a head that runs in training only."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.extra = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Any:
        outputs = super().forward(images + 0 * torch.randn(1))
        return (outputs, self.extra(outputs)) if self.training else outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0])[0], batch[1])


@pytest.mark.parametrize("verbose", [False, True])
def test_training_draws_the_numbers_that_it_would_have_drawn(verbose: bool, tmp_path: Path) -> None:
    class Draws(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            drawn.append(torch.get_rng_state())

    draws = []
    for callbacks in ([], [quiet(FLOPs(0.5), remove="now", verbose=verbose)]):
        drawn: list[Tensor] = []
        module = Noisy()
        torch.manual_seed(5)
        trainer(tmp_path, *callbacks, Draws(), max_epochs=2).fit(module, images())
        draws.append(drawn)
    assert_same_state(*draws)


def test_optimizers_forget_what_is_gone(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            weight = pl_module.net[0].weight
            gone = (weight == 0).all(1)
            if gone.any():
                counts.append(int(gone.sum()))
                assert not trainer.optimizers[0].state[weight]["momentum_buffer"][gone].any()

    counts: list[int] = []
    trainer(tmp_path, quiet(ramp=OneShotRamp(), begin=0.5, end=0.55), Look()).fit(Classifier(sgd), loader())
    assert counts[0] == 8


def test_the_table_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, quiet(verbose=True)).fit(Classifier(), loader())
    shown = capsys.readouterr().out
    for word in ("Channels removed", "parameters", "FLOPs", "bytes", "latency (ms)", "50.0%"):
        assert word in shown


@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoints_load_into_both_modules(averaged: bool, tmp_path: Path) -> None:
    module, pruning = Classifier(adamw), quiet()
    more = [EMAWeightAveraging(decay=0.8)] if averaged else []
    run = trainer(tmp_path, pruning, *more)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    small = load_shrunk(Classifier, tmp_path / "last.ckpt")
    assert_same_state(small.state_dict(), pruning.shrunk.state_dict())
    whole = Classifier.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    inputs = torch.randn(5, 12)
    torch.testing.assert_close(small.eval()(inputs), whole(inputs))
