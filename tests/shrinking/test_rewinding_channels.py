"""Rewinding with `ChannelPruning`: rounds start from the same moment, with fewer channels each."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from support import Classifier, adamw, assert_same_state, loader, trainer

from lightning_structopt import LRDecay
from lightning_structopt.pruning import LinearRamp, RewindLR, RewindWeights
from lightning_structopt.schedules import Linear
from lightning_structopt.shrinking import ChannelPruning, ChannelRatio

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Keep(pl.Callback):
    """Keeps the module's state at the start of every epoch, and the learning rate of every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def rounds(rewind: Any, **options: Any) -> ChannelPruning:
    """Rounds of two epochs: channels go at the start of epochs 2, 4 and 6 of 8."""
    given = {"begin": 0.25, "end": 0.8, "every": 2, "ramp": LinearRamp(), "verbose": False, **options}
    return ChannelPruning(ChannelRatio(0.25), rewind=rewind, **given)


def test_weights_go_back_to_an_early_moment_and_channels_that_are_gone_do_not(tmp_path: Path) -> None:
    before, after, pruning = Keep(), Keep(), rounds(RewindWeights(to=0.125))
    trainer(tmp_path, before, pruning, after, max_epochs=8).fit(Classifier(adamw), loader())
    early, left = before.states[1], []
    for epoch in (2, 4, 6):
        state = after.states[epoch]
        alive = state["net.0.weight"].any(1)
        left.append(int(alive.sum()))
        assert_same_state(state["net.0.weight"][alive], early["net.0.weight"][alive])
        assert_same_state(state["net.3.weight"][:, alive], early["net.3.weight"][:, alive])
        assert_same_state(state["net.1.running_mean"], early["net.1.running_mean"])
        assert not torch.equal(before.states[epoch]["net.0.weight"][alive], early["net.0.weight"][alive])
    assert left == [12, 8, 4]
    assert pruning.shrunk.net[0].out_features == 4


@pytest.mark.parametrize("remove", ["end", "now"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_rates_restart_in_each_round(remove: Any, interval: Any, tmp_path: Path) -> None:
    keep, decay = Keep(), LRDecay(Linear(), interval=interval)
    callbacks = (rounds(RewindLR(to=0.125), remove=remove), decay, keep)
    trainer(tmp_path, *callbacks, max_epochs=8).fit(Classifier(), loader())
    unit, length = (1, 8) if interval == "step" else (4, 2)
    clock = [*range(8), *range(4, 12), *range(4, 12), *range(4, 12)]  # batches; rounds go back to batch 4
    assert keep.rates == pytest.approx([0.1 * max(0, 1 - (t // unit) / length) for t in clock])


@pytest.mark.parametrize("rewind", [RewindWeights(), RewindWeights(to=0.125), RewindLR(to=0.125)], ids=repr)
@pytest.mark.parametrize("remove", ["end", "now"])
def test_resume_equals_straight(rewind: Any, remove: Any, tmp_path: Path) -> None:
    def fit(*more: Any, ckpt: Any = None) -> tuple[Any, list[float]]:
        keep, pruning = Keep(), rounds(rewind, remove=remove)
        run = trainer(tmp_path, LRDecay(Linear(), interval="step"), pruning, keep, *more, max_epochs=8)
        run.fit(Classifier(adamw), loader(), ckpt_path=ckpt)
        return run, keep.rates

    straight, rates = fit(ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}"))
    for epoch in range(7):
        resumed, seen = fit(ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
        assert seen == rates[4 * (epoch + 1) :]


def test_what_would_not_go_back_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an average of weights would mix the rounds"):
        trainer(tmp_path, rounds(RewindWeights()), EMAWeightAveraging()).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="Found no schedule. Add an `LRDecay`"):
        trainer(tmp_path, rounds(RewindLR())).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="Found `rewind.to = 0.5` and `begin = 0.25`. Give a later `begin`"):
        rounds(RewindWeights(to=0.5))
    with pytest.raises(TypeError, match="`rewind` must be a `Rewind`"):
        rounds(0.5)
