"""Rewinding in one fit against the same rounds done by hand."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, sgd, trainer, zeros

from lightning_structopt import LRDecay
from lightning_structopt.pruning import GeometricRamp, IterativePruning, RewindLR, RewindWeights, prune
from lightning_structopt.schedules import Linear, Polynomial

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
WEIGHTS = 256


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


class Keep(pl.Callback):
    """Keeps the module's state at the start of every epoch, before and after pruning."""

    def __init__(self) -> None:
        self.states: list[dict] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def rounds(rewind: Any = None, **kwargs: Any) -> IterativePruning:
    """Rounds of two epochs: prunes at the start of epochs 2, 4 and 6 of 8."""
    options = {"begin": 0.25, "end": 0.8, "every": 2, "ramp": GeometricRamp(), "verbose": False, **kwargs}
    return IterativePruning(0.8, rewind=rewind or RewindWeights(), **options)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_lottery_tickets_as_by_hand(tmp_path: Path, order: str, make: Any) -> None:
    """Round by round: a fresh trainer on the initial weights under the masks so far, rates from the start."""
    pruning, decay = rounds(), LRDecay(Linear())
    callbacks = [pruning, decay] if order == "before" else [decay, pruning]
    module = Classifier(make)
    trainer(tmp_path, *callbacks, max_epochs=8).fit(module, loader())

    by_hand, initial = Classifier(make), Classifier(make).state_dict()
    steps = rounds()._window.steps(8, "epoch").as_rounds()
    for moment in (None, 2, 4, 6):
        if moment is not None:
            masks = prune(by_hand, pruning.ramp(steps.progress(moment), 0.8))
            by_hand.load_state_dict(initial)
            for name, mask in masks.items():
                dict(by_hand.named_parameters())[name].data.mul_(mask)
        held = IterativePruning(0.0, verbose=False) if moment is None else _Held(masks)
        trainer(tmp_path, held, LRDecay(Linear()), max_epochs=2).fit(by_hand, loader())
    assert zeros(module) == round(0.8 * WEIGHTS)
    assert_same_state(module.state_dict(), by_hand.state_dict())


class _Held(pl.Callback):
    """Holds zeros in the plainest way there is."""

    def __init__(self, masks: dict[str, torch.Tensor]) -> None:
        self.masks = masks

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.masks.items():
            parameters[name].grad.mul_(mask)


def test_weights_go_back_to_an_early_moment_with_buffers_and_unpruned_parameters(tmp_path: Path) -> None:
    before, after = Keep(), Keep()
    pruning = rounds(RewindWeights(to=0.125))
    trainer(tmp_path, before, pruning, after, max_epochs=8).fit(Classifier(adamw), loader())
    early = before.states[1]
    for epoch in (2, 4, 6):
        state = after.states[epoch]
        assert_same_state(state["net.1.running_mean"], early["net.1.running_mean"])
        assert_same_state(state["net.0.bias"], early["net.0.bias"])
        for name in ("net.0.weight", "net.3.weight"):
            alive = state[name] != 0
            assert_same_state(state[name][alive], early[name][alive])
        assert not torch.equal(before.states[epoch]["net.0.bias"], early["net.0.bias"])


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_rates_restart_in_each_round_and_weights_stay(tmp_path: Path, order: str, interval: Any) -> None:
    rates, before, after = Rates(), Keep(), Keep()
    pruning, decay = rounds(RewindLR(to=0.125)), LRDecay(Polynomial(power=2.0), interval=interval)
    callbacks = [pruning, decay] if order == "before" else [decay, pruning]
    trainer(tmp_path, before, *callbacks, after, rates, max_epochs=8).fit(Classifier(), loader())
    unit, length = (1, 8) if interval == "step" else (4, 2)
    clock = [*range(8), *range(4, 12), *range(4, 12), *range(4, 12)]  # batches; rounds go back to batch 4
    expected = [0.1 * max(0, 1 - (t // unit) / length) ** 2 for t in clock]
    assert rates.seen == pytest.approx(expected)
    for epoch in (2, 4, 6):
        for name in ("net.0.weight", "net.3.weight"):
            alive = after.states[epoch][name] != 0
            assert_same_state(after.states[epoch][name][alive], before.states[epoch][name][alive])


@pytest.mark.parametrize("rewind", [RewindWeights(), RewindWeights(to=0.125), RewindLR(to=0.125)], ids=repr)
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_resume_equals_straight(tmp_path: Path, rewind: Any, interval: Any) -> None:
    def fit(*more: Any, ckpt: Any = None) -> tuple[Any, list[float]]:
        rates = Rates()
        run = trainer(
            tmp_path, LRDecay(Linear(), interval=interval), rounds(rewind), rates, *more, max_epochs=8
        )
        run.fit(Classifier(adamw), loader(), ckpt_path=ckpt)
        return run, rates.seen

    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
    straight, rates = fit(saved)
    for epoch in range(7):
        resumed, seen = fit(ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
        assert seen == rates[4 * (epoch + 1) :]


def test_snapshots_load_safely_and_must_fit(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer(tmp_path, rounds(), saved, max_epochs=8).fit(Classifier(), loader())
    checkpoint = torch.load(saved.last_model_path, weights_only=True)
    state = next(value for key, value in checkpoint["callbacks"].items() if "IterativePruning" in key)
    assert_same_state(dict(state["rewinding"]["snapshot"]), dict(Classifier().state_dict()))
    del state["rewinding"]["snapshot"]["net.0.bias"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="snapshot to rewind to in a checkpoint must fit the module"):
        trainer(tmp_path, rounds(), max_epochs=9).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "other.ckpt"
        )


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3)]


@pytest.mark.parametrize(
    ("callbacks", "module", "message"),
    [
        (
            [rounds(RewindLR(to=0.1))],
            Classifier(),
            r"`RewindLR\(to=0.1\)` the learning rate restarts.* Found no sche",
        ),
        ([rounds()], Scheduled(), "Found StepLR. Add an `LRDecay` instead"),
        ([rounds(), EMAWeightAveraging()], Classifier(), "an average of weights would mix the rounds"),
        ([rounds(), LRDecay(Linear(), horizon=9)], ManualClassifier(), "only epochs can be rewound"),
    ],
    ids=["no decay", "own scheduler", "average", "manual"],
)
def test_what_would_not_go_back_is_refused(tmp_path: Path, callbacks: Any, module: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, *callbacks, max_epochs=8).fit(module, loader())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RewindWeights(to=1.0), r"`to` must be in \[0, 1\). Found `to = 1.0`"),
        (
            lambda: rounds(RewindWeights(to=0.5)),
            "Found `rewind.to = 0.5` and `begin = 0.25`. Give a later `begin`",
        ),
    ],
)
def test_bad_moments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
    with pytest.raises(TypeError, match="`rewind` must be a `Rewind`"):
        IterativePruning(rewind=0.5)
