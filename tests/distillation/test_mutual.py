"""Members that teach each other: as by hand, each with its own optimizer, schedule and log."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from students import fit
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, sgd, trainer
from torch import nn

from lightning_structopt.distillation import MutualDistillation
from lightning_structopt.distillation.losses.classes import DKD
from lightning_structopt.distillation.losses.logits import LogitMSE, SoftTarget
from lightning_structopt.distillation.mutual.optimizers import one_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Scheduled(Classifier):
    def __init__(self, hidden: int = 16, interval: str = "epoch", **kwargs: Any) -> None:
        super().__init__(sgd, hidden=hidden)
        self.interval, self.starts = interval, 0

    def configure_optimizers(self) -> Any:
        optimizer = sgd(self.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def on_train_epoch_start(self) -> None:
        assert self.trainer.current_epoch == self.current_epoch
        self.starts += 1


def members() -> list[Any]:
    return [Classifier(adamw, hidden=8), Scheduled(24), Classifier(adamw, hidden=12)]


@pytest.mark.parametrize("loss", [SoftTarget(1.0), LogitMSE(), DKD()], ids=lambda loss: type(loss).__name__)
def test_weights_are_those_of_a_loop_by_hand(loss: Any, tmp_path: Path) -> None:
    module = MutualDistillation(members(), loss, weight=0.5)
    run = fit(tmp_path, module, max_epochs=2)
    assert run.callback_metrics.keys() >= {
        "0/val_acc",
        "1/train_loss",
        "2/val_acc",
        f"1/kd/{type(loss).__name__}",
    }
    by_hand = members()
    optimizers = [
        adamw(by_hand[0].parameters()),
        sgd(by_hand[1].parameters()),
        adamw(by_hand[2].parameters()),
    ]
    for _ in range(2):
        for inputs, labels in loader():
            outputs = [member.train()(inputs) for member in by_hand]
            total = sum(nn.functional.cross_entropy(output, labels) for output in outputs)
            for i, mine in enumerate(outputs):
                for j, theirs in enumerate(outputs):
                    total = total + (0.25 * loss(mine, theirs.detach(), labels) if i != j else 0)
            for optimizer in optimizers:
                optimizer.zero_grad()
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
        optimizers[1].param_groups[0]["lr"] *= 0.5
    for found, expected in zip(module.members.values(), by_hand, strict=True):
        torch.testing.assert_close(found.state_dict(), expected.state_dict())
    assert module.members["1"].starts == 2
    assert not any(part._forward_hooks for part in module.modules())


def test_resume_equals_straight(tmp_path: Path) -> None:
    straight = MutualDistillation({"a": Classifier(adamw), "b": Scheduled(interval="step")})
    fit(tmp_path, straight, ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    for epoch in range(3):
        resumed = MutualDistillation({"a": Classifier(adamw), "b": Scheduled(interval="step")})
        run = fit(tmp_path, resumed, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.state_dict(), straight.state_dict())
    assert run.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**16)


def test_a_member_is_exported_alone(tmp_path: Path) -> None:
    module = MutualDistillation({"a": Classifier(adamw), "b": Scheduled()})
    fit(tmp_path, module, max_epochs=1)
    module.export_student("a", tmp_path / "a.ckpt")
    found = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert_same_state(found.state_dict(), module.members["a"].state_dict())
    with pytest.raises(KeyError, match="c"):
        module.export_student("c", tmp_path / "c.ckpt")


def test_a_plateau_watches_its_own_members_metric(tmp_path: Path) -> None:
    class Plateau(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = sgd(self.parameters())
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, patience=0, factor=0.5, threshold=9.0
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_acc"}}

    run = fit(tmp_path, MutualDistillation([Classifier(), Plateau()]), max_epochs=3)
    assert run.optimizers[1].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_two_fits_and_evaluation_alone(tmp_path: Path) -> None:
    module = MutualDistillation([Classifier(adamw), Classifier(adamw, hidden=8)])
    run = trainer(tmp_path, max_epochs=1)
    assert run.validate(module, loader(), verbose=False)[0].keys() == {"0/val_acc", "1/val_acc"}
    run.test(module, loader(), verbose=False)
    fit(tmp_path, module, max_epochs=1)
    fit(tmp_path, module, fast_dev_run=True)
    assert module(torch.ones(2, 12)).keys() == {"0", "1"}


TWICE = Classifier()
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "one": (lambda: [Classifier()], ValueError, "two different modules or more"),
    "the same": (lambda: [TWICE, TWICE], ValueError, "two different modules or more"),
    "manual": (
        lambda: [Classifier(), ManualClassifier()],
        ValueError,
        "`automatic_optimization = False` in member `1`",
    ),
    "a net": (
        lambda: {"a": Classifier(), "b": nn.Linear(1, 1)},
        TypeError,
        "`members.'b'.` must be a `Lightning",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_members(make: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        MutualDistillation(make())


def test_members_that_share_parameters() -> None:
    one, other = Classifier(), Classifier()
    other.net = one.net
    with pytest.raises(ValueError, match="Found `net.0.weight` in `0` and `1`"):
        MutualDistillation([one, other])
    with pytest.raises(ValueError, match=r"`weight` must be in \[0, inf\)"):
        MutualDistillation([Classifier(), Classifier()], weight=-1)


OPTIMIZER = sgd([torch.zeros(1, requires_grad=True)])
SCHEDULER = torch.optim.lr_scheduler.ExponentialLR(OPTIMIZER, 0.5)


@pytest.mark.parametrize(
    ("returned", "scheduled"),
    [
        (OPTIMIZER, False),
        ([OPTIMIZER], False),
        (([OPTIMIZER], []), False),
        (([OPTIMIZER], [SCHEDULER]), True),
        ({"optimizer": OPTIMIZER}, False),
        ([{"optimizer": OPTIMIZER, "lr_scheduler": SCHEDULER}], True),
    ],
    ids=["bare", "list", "no schedulers", "lists", "dict", "dicts"],
)
def test_every_form_of_an_optimizer(returned: Any, scheduled: bool) -> None:
    found = one_optimizer("a", returned)
    assert found["optimizer"] is OPTIMIZER
    assert ("lr_scheduler" in found) == scheduled


@pytest.mark.parametrize(
    "returned",
    [None, [OPTIMIZER, OPTIMIZER], ([OPTIMIZER], [SCHEDULER] * 2)],
    ids=["none", "two", "schedulers"],
)
def test_more_or_fewer_optimizers_than_one(returned: Any) -> None:
    with pytest.raises(ValueError, match="Each member of `MutualDistillation` has one optimizer"):
        one_optimizer("a", returned)
