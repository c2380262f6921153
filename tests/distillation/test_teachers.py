"""Kinds of teachers: several, the student's own past, and generations."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from students import a_teacher, distilling, fit
from support import Classifier, adamw, assert_same_state, loader, trainer
from torch import Tensor, nn

from lightning_structopt.distillation import DistillationModule, EMATeacher, Teachers, born_again
from lightning_structopt.distillation.losses.logits import SoftTarget

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Says(nn.Module):
    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.register_buffer("outputs", outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs


def opinions(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape) * 3 for _ in range(3)]


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 5.0)])
@pytest.mark.parametrize(("shape", "dim"), [((6, 4), 1), ((6, 4, 3, 2), 1), ((6, 5, 4), -1)])
def test_means_and_choices_against_loops(weights: Any, shape: tuple[int, ...], dim: int) -> None:
    outputs = opinions(*shape)
    shares = [1 / 3] * 3 if weights is None else [weight / 8 for weight in weights]

    def ask(combine: Any) -> Tensor:
        return Teachers([Says(o) for o in outputs], weights, combine, class_dim=dim)(torch.ones(6, 1))

    mean = sum(share * output for share, output in zip(shares, outputs, strict=True))
    torch.testing.assert_close(ask("outputs"), mean)
    probabilities = sum(share * o.softmax(dim) for share, o in zip(shares, outputs, strict=True))
    torch.testing.assert_close(ask("probabilities").softmax(dim), probabilities)
    chosen = ask("confidence")
    for sample in range(6):
        sure = [
            s * o.softmax(dim)[sample].amax(dim if dim < 0 else 0).mean()
            for s, o in zip(shares, outputs, strict=True)
        ]
        assert torch.equal(chosen[sample], outputs[int(torch.stack(sure).argmax())][sample])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "a member at least and a weight for each"),
        (([nn.Identity()], [0.0]), "not all 0"),
        (([nn.Identity()], [1.0, 2.0]), "Found 1 members and `weights = "),
        (([nn.Identity()], [math.nan]), r"`weights` must be in \[0, inf\)"),
        (([nn.Identity()], None, "vote"), "`combine` must be 'outputs' or"),
    ],
    ids=["none", "zero", "more", "nan", "combine"],
)
def test_wrong_teachers(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teachers(*arguments)


def test_teachers_of_different_classes() -> None:
    with pytest.raises(ValueError, match=r"outputs of one shape. Found \[\(2, 3\), \(2, 4\)\]"):
        Teachers([Says(torch.ones(2, 3)), Says(torch.ones(2, 4))])(torch.ones(2, 1))


def test_two_of_the_same_teachers_are_as_one(tmp_path: Path) -> None:
    module, one = DistillationModule(Teachers([a_teacher(), a_teacher()]), Classifier(adamw)), distilling()
    fit(tmp_path, module)
    fit(tmp_path, one)
    assert_same_state(module.state_dict(), one.state_dict())


def test_an_average_of_the_students_past_teaches_and_resumes(tmp_path: Path) -> None:
    class ByHand(Classifier):
        """Mean teacher, written out."""

        def __init__(self) -> None:
            super().__init__(adamw)
            vars(self)["average"] = Classifier(adamw).eval()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            student = self(batch[0])
            task = nn.functional.cross_entropy(student, batch[1])
            with torch.no_grad():
                teacher = self.average(batch[0])
            return 0.5 * task + 0.5 * SoftTarget()(student, teacher)

        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                for mine, theirs in zip(self.average.parameters(), self.parameters(), strict=True):
                    mine.lerp_(theirs, 0.25)
                for mine, theirs in zip(self.average.buffers(), self.buffers(), strict=True):
                    mine.copy_(theirs)

    by_hand = ByHand()
    fit(tmp_path, by_hand)
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=3, filename="{step}")
    module = DistillationModule(EMATeacher(0.75), Classifier(adamw))
    fit(tmp_path, module, saved)
    assert_same_state(module.state_dict(), by_hand.state_dict())
    assert_same_state(module.teacher.state_dict(), by_hand.average.state_dict())
    resumed = DistillationModule(EMATeacher(0.75), Classifier(adamw))
    fit(tmp_path, resumed, ckpt=tmp_path / "step=12.ckpt")
    assert_same_state(resumed.state_dict(), module.state_dict())
    assert_same_state(resumed.teacher.state_dict(), module.teacher.state_dict())


def test_the_average_starts_from_weights_loaded_after_construction(tmp_path: Path) -> None:
    module = DistillationModule(EMATeacher(0.999), Classifier(adamw))
    loaded = Classifier(seed=5).state_dict()
    module.student.load_state_dict(loaded)
    fit(tmp_path, module, max_epochs=1)
    distance = (module.teacher.net[0].weight - loaded["net.0.weight"]).abs().max()
    assert 0 < distance < 0.001


def test_a_copy_of_the_student_has_an_average_of_its_own(tmp_path: Path) -> None:
    module = DistillationModule(EMATeacher(0.75), Classifier(adamw))
    fit(tmp_path, module, max_epochs=1)
    twin, before = copy.deepcopy(module), copy.deepcopy(module.teacher.state_dict())
    fit(tmp_path, twin, max_epochs=1)
    assert_same_state(module.teacher.state_dict(), before)
    fit(tmp_path, module, max_epochs=1)
    assert_same_state(twin.teacher.state_dict(), module.teacher.state_dict())


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_a_wrong_decay(decay: float) -> None:
    with pytest.raises(ValueError, match=r"`decay` must be in \[0, 1\)"):
        EMATeacher(decay)


def test_copies_of_the_student_share_one_teacher(tmp_path: Path) -> None:
    module = distilling()
    assert copy.deepcopy(module).teacher is module.teacher
    run = trainer(tmp_path, max_epochs=1)
    run.fit(copy.deepcopy(module), loader())


def test_each_generation_learns_from_the_one_before(tmp_path: Path) -> None:
    def train(module: Any) -> None:
        fit(tmp_path, module, max_epochs=1)

    found = born_again(lambda: Classifier(adamw), DistillationModule, train, generations=3)
    first, second, third = (Classifier(adamw) for _ in range(3))
    train(first)
    train(DistillationModule(first, second))
    train(DistillationModule(second, third))
    for student, expected in zip(found, (first, second, third), strict=True):
        assert_same_state(student.state_dict(), expected.state_dict())
    with pytest.raises(ValueError, match="`generations` must be at least 1"):
        born_again(Classifier, DistillationModule, train, generations=0)


def test_from_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # taken back afterwards
    (tmp_path / "config.yaml").write_text(
        """
seed_everything: 0
trainer: {accelerator: cpu, max_epochs: 1, logger: false, enable_checkpointing: false,
          enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: lightning_structopt.distillation.DistillationModule
  init_args:
    teacher: {class_path: support.Classifier, init_args: {hidden: 24}}
    student: {class_path: support.Classifier, init_args: {hidden: 8}}
    loss: {class_path: lightning_structopt.distillation.losses.logits.SoftTarget, init_args: {temperature: 2.0}}
    alpha: 0.9
    schedule: {class_path: lightning_structopt.Linear}
"""
    )
    cli = LightningCLI(
        DistillationModule, subclass_mode_model=True, save_config_callback=None,
        args=["fit", "--config", str(tmp_path / "config.yaml"), "--data", "test_teachers.Digits"],
    )  # fmt: skip
    assert cli.trainer.global_step == 4
    assert cli.model.student.net[0].out_features == 8


class Digits(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()
