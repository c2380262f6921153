"""What is wrong is said before a weight changes."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from students import a_teacher, distilling, fit
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, trainer
from torch import Tensor, nn

import lightning_structopt as so
from lightning_structopt.distillation import DistillationModule
from lightning_structopt.distillation.balance import Balance
from lightning_structopt.distillation.losses.classes import DKD
from lightning_structopt.distillation.losses.features import Hint
from lightning_structopt.distillation.losses.logits import SoftTarget
from lightning_structopt.distillation.losses.tokens import TokenKL
from lightning_structopt.distillation.pairs import pairs_from


class Unusual(Classifier):
    """Calls its parts as the test says."""

    def __init__(self, calls: Any) -> None:
        super().__init__(adamw)
        self.calls = calls

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.calls(self, batch[0]).logsumexp(1).mean()


class Teacher(nn.Module):
    def __init__(self, calls: Any) -> None:
        super().__init__()
        self.net = nn.Linear(12, 4)
        self.calls = calls

    def forward(self, inputs: Tensor) -> Tensor:
        return self.calls(self.net, inputs)


def with_gradients(net: nn.Module, inputs: Tensor) -> Tensor:
    with torch.enable_grad():
        return net(inputs)


class FromIterator(Classifier):
    def training_step(self, dataloader_iter: Any) -> None: ...


SHARED = Classifier()
CONSTRUCTION: dict[str, tuple[Any, type[Exception], str]] = {
    "manual": (
        lambda: DistillationModule(a_teacher(), ManualClassifier()), ValueError,
        "Found `automatic_optimization = False` in `ManualClassifier`",
    ),
    "iterator": (lambda: DistillationModule(a_teacher(), FromIterator()), TypeError, "takes `dataloader_iter`"),
    "student": (
        lambda: DistillationModule(a_teacher(), nn.Linear(1, 1)), TypeError, "`student` must be a `LightningModule`",
    ),
    "student's class": (lambda: DistillationModule(a_teacher(), Classifier), TypeError, "Did you mean"),
    "teacher": (lambda: DistillationModule("resnet", Classifier()), TypeError, "`teacher` must be a `Module`"),
    "itself": (
        lambda: DistillationModule(SHARED, SHARED), ValueError,
        r"The teacher is frozen.*both hold `net.0.weight`, which requires a gradient. Give `copy.deepcopy",
    ),
    "alpha": (lambda: distilling(alpha=1.5), ValueError, r"`alpha` must be in \[0, 1\]. Found `alpha = 1.5`"),
    "alpha, nan": (lambda: distilling(alpha=math.nan), ValueError, r"`alpha` must be in \[0, 1\]. Found `alpha = nan`"),
    "weight": (lambda: distilling(weight=-1.0), ValueError, r"`weight` must be in \[0, inf\)"),
    "both": (lambda: distilling(alpha=0.5, weight=1.0), ValueError, "Found `alpha = 0.5` and `weight = 1.0`. Give one"),
    "schedule": (lambda: distilling(schedule=0.5), TypeError, "`schedule` must be a `Schedule`"),
    "temperature": (lambda: distilling(SoftTarget(0.0)), ValueError, r"`temperature` must be in \(0, inf\)"),
    "loss": (lambda: distilling(nn.MSELoss()), TypeError, "`loss` must be a `DistillationLoss`"),
    "loss's class": (lambda: distilling(SoftTarget), TypeError, r"Did you mean `SoftTarget\(\)`"),
    "no loss": (lambda: distilling({}), ValueError, "a loss of its own for each place, one at least"),
    "one loss twice": (lambda: distilling(dict.fromkeys(["logits", "net.0"], SoftTarget())), ValueError, "of its own"),
    "place": (lambda: distilling({("a", "b", "c"): SoftTarget()}), TypeError, r"Found `\('a', 'b', 'c'\)`"),
    "weight of a loss": (
        lambda: distilling({"logits": (-1, SoftTarget())}), ValueError, r"`weight of a loss` must be in \[0, inf\)",
    ),
    "precision": (
        lambda: distilling(teacher_precision="bf16"), ValueError, '`teacher_precision` must be .*"?bfloat16',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION)
def test_wrong_arguments(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def both(net: Any, inputs: Tensor) -> Tensor:
    return net(inputs) + net(inputs)


def linear(outputs: int) -> nn.Module:
    return nn.Linear(12, outputs)


class Tokens(Classifier):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs).unsqueeze(1).expand(-1, 2, -1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).logsumexp(-1).mean()


FITTING: dict[str, tuple[Any, str]] = {
    "classes": (
        lambda: DistillationModule(linear(10), Classifier()), "The teacher returned 10 classes and the student 4",
    ),
    "no such tap": (
        lambda: distilling({("net.9", "net.0"): Hint()}), r"a module of the student.*Found `net.9`.*Near it: `net.",
    ),
    "no such tap of the teacher": (
        lambda: distilling({("net.0", "nte.0"): Hint()}), r"a module of the teacher.*Found `nte.0`.*Near it: `net.0`",
    ),
    "no output": (
        lambda: distilling(student=Unusual(lambda self, x: self.net(x))),
        r"Found no such call. Name the module that gives it: `loss=\{\(\"NAME\", \"logits\"\).*\['net'\]",
    ),
    "two outputs": (
        lambda: distilling(student=Unusual(both)), "`logits` of the student must run exactly once.*Found 2 runs",
    ),
    "two runs of a tap": (
        lambda: distilling({("net.0", "net.0"): Hint()}, Unusual(both)), "`net.0` of the student.*Found 2 runs",
    ),
    "two runs of the teacher": (
        lambda: DistillationModule(Teacher(both), Classifier(), {("net.3", "net"): SoftTarget()}),
        "`net` of the teacher .* Found 2 runs",
    ),
    "teacher with gradients": (
        lambda: DistillationModule(Teacher(with_gradients), Classifier()),
        "The teacher must be frozen. Found an output that requires a gradient",
    ),
    "nan": (
        lambda: DistillationModule(Teacher(lambda net, x: net(x) * math.nan), Classifier()),
        "The teacher must put out numbers. Found NaN for batch 0",
    ),
    "vocabulary": (
        lambda: DistillationModule(
            Teacher(lambda net, x: torch.zeros(len(x), 2, 7)),
            Tokens(),
            TokenKL(),
        ),
        "`TokenKL` needs one vocabulary. Found 7 tokens of the teacher's and 4 of the student's",
    ),
    "endless schedule": (lambda: distilling(schedule=so.Linear()), "needs to know how many steps training takes"),
    "endless temperature": (
        lambda: distilling(SoftTarget(4.0, so.Linear(end=0.5))), "needs to know how many steps training takes",
    ),
    "labels": (
        lambda: distilling(DKD(), target=lambda batch: batch[1].float()), "`DKD` needs labels that are class indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FITTING.values(), ids=FITTING)
def test_what_shows_in_the_first_step_shows_before_weights_change(
    make: Any, message: str, tmp_path: Path
) -> None:
    module = make()
    before = copy.deepcopy(dict(module.named_parameters()))
    endless = "needs to know" in message
    with pytest.raises((TypeError, ValueError), match=message):
        fit(tmp_path, module, max_epochs=-1 if endless else 1, num_sanity_val_steps=0)
    assert_same_state(dict(module.named_parameters()), before)


def test_nan_names_the_batch(tmp_path: Path) -> None:
    calls = iter(range(100))
    teacher = Teacher(lambda net, x: net(x) * (math.nan if next(calls) == 2 else 1))
    with pytest.raises(ValueError, match="Found NaN for batch 2"):
        fit(tmp_path, DistillationModule(teacher, Classifier()))


def test_a_batch_of_an_unknown_kind(tmp_path: Path) -> None:
    class Batch:
        def __init__(self, parts: Any) -> None:
            self.inputs, self.labels = torch.utils.data.default_collate(parts)

        def __getitem__(self, index: int) -> Tensor:
            return (self.inputs, self.labels)[index]

    class Unpacks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch.inputs, batch.labels), batch_idx)

    data = loader(collate_fn=Batch)
    with pytest.raises(TypeError, match="Found a batch of type `Batch`. Give `teacher_input`"):
        trainer(tmp_path).fit(DistillationModule(a_teacher(), Unpacks()), data)
    reading = {"teacher_input": lambda batch: batch.inputs, "loss": DKD()}
    with pytest.raises(TypeError, match="Found a batch of type `Batch` without. Give `target`"):
        trainer(tmp_path).fit(DistillationModule(a_teacher(), Unpacks(), **reading), data)
    module = DistillationModule(a_teacher(), Unpacks(), **reading, target=lambda batch: batch.labels)
    trainer(tmp_path, max_epochs=1).fit(module, data)


def test_no_optimizer_for_adapters(tmp_path: Path) -> None:
    class None_(Classifier):
        def configure_optimizers(self) -> None:
            return None

    with (
        pytest.warns(UserWarning, match="will run with no optimizer"),
        pytest.raises(ValueError, match="Adapters are tr"),
    ):
        fit(tmp_path, distilling({("net.0", "net.0"): Hint()}, None_()))


def test_the_other_package(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Foreign(other.LightningModule):
        pass

    with pytest.raises(TypeError, match="of the package `pytorch_lightning`"):
        DistillationModule(a_teacher(), Foreign())


def test_repr_of_a_balance() -> None:
    assert (
        eval(repr(Balance(weight=2.0, schedule=so.Linear())), {**vars(so), "Balance": Balance}).weight == 2.0
    )


def test_titles_tell_losses_apart() -> None:
    pairs = pairs_from({("a", "x"): Hint(), ("a", "y"): Hint(), "logits": SoftTarget()})
    assert [pair.title for pair in pairs] == ["Hint/a/x", "Hint/a/y", "SoftTarget"]


def test_a_module_of_its_own_kind_can_be_wrapped_by_hand() -> None:
    assert isinstance(distilling(), pl.LightningModule)
