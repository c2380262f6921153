"""Checkpoints are the student's, load safely, and go on where they stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from students import a_teacher, distilling, fit
from support import Classifier, adamw, assert_same_state, loader, trainer

import lightning_structopt as so
from lightning_structopt.distillation import DistillationModule
from lightning_structopt.distillation.losses.contrastive import ContrastiveRepresentation
from lightning_structopt.distillation.losses.features import Hint
from lightning_structopt.distillation.losses.logits import SoftTarget

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Configured(Classifier):
    """Saves its hyperparameters, and something of its own in checkpoints."""

    def __init__(self, hidden: int = 16, note: Any = "none") -> None:
        super().__init__(adamw, hidden)
        self.save_hyperparameters()
        self.loaded = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.hparams.hidden

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint["mine"]


def losses() -> dict[Any, Any]:
    return {"logits": SoftTarget(), ("net.0", "net.0"): (0.5, Hint()), ("net.2", "net.2"): crd()}


def crd() -> ContrastiveRepresentation:
    return ContrastiveRepresentation(dim=4, queue=12)


def assert_validates(path: Path, module: DistillationModule, tmp_path: Path) -> None:
    found = Configured.load_from_checkpoint(path, weights_only=True)
    assert_same_state(found.state_dict(), module.state_dict())
    assert (found.hparams.hidden, found.loaded) == (8, 8)
    run = trainer(tmp_path)
    scores = run.validate(Configured(8), loader(), ckpt_path=path, weights_only=True, verbose=False)
    assert scores == trainer(tmp_path).validate(found, loader(), verbose=False)


@pytest.fixture
def trained(tmp_path: Path) -> DistillationModule:
    module = distilling(losses(), Configured(8))
    fit(tmp_path, module, ModelCheckpoint(tmp_path / "saved", save_last=True))
    return module


def test_every_checkpoint_loads_into_the_students_own_class(
    trained: DistillationModule, tmp_path: Path
) -> None:
    assert_validates(tmp_path / "saved" / "last.ckpt", trained, tmp_path)


def test_an_exported_student_loads_into_its_own_class(trained: DistillationModule, tmp_path: Path) -> None:
    path = tmp_path / "new" / "student.ckpt"
    trained.export_student(path)
    trained.export_student(path)  # over itself
    assert_validates(path, trained, tmp_path)
    assert [file.name for file in path.parent.iterdir()] == ["student.ckpt"]
    content = torch.load(path, weights_only=True)
    assert content.keys() == {
        "pytorch-lightning_version",
        "state_dict",
        "hyper_parameters",
        "hparams_name",
        "mine",
    }


def test_no_checkpoint_holds_the_teacher(trained: DistillationModule, tmp_path: Path) -> None:
    checkpoint = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == Configured().state_dict().keys()
    assert checkpoint["hyper_parameters"] == {"hidden": 8, "note": "none"}
    teacher = [value for value in trained.teacher.state_dict().values() if value.ndim]
    stored: list[torch.Tensor] = []

    def collect(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            stored.append(part)
        for inner in (
            part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
        ):
            collect(inner)

    collect(checkpoint)
    assert len(stored) > 20
    assert not any(
        one.shape == other.shape and torch.equal(one, other) for one in stored for other in teacher
    )


class Opaque:
    pass


def test_hyperparameters_that_are_no_plain_data(tmp_path: Path) -> None:
    module = distilling(student=Configured(note=Opaque()))
    with pytest.raises(
        ValueError, match=r'must load with `weights_only=True`.*"hyper_parameters".*save_hyperparameters'
    ):
        module.export_student(tmp_path / "student.ckpt")
    assert not (tmp_path / "student.ckpt").exists()


CASES: dict[str, Any] = {
    "default": lambda: {},
    "adapters and a queue": lambda: {"loss": losses()},
    "schedules": lambda: {"loss": SoftTarget(4.0, so.Linear(end=0.5)), "alpha": 0.9, "schedule": so.Cosine()},
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@pytest.mark.parametrize("averaged", [False, True], ids=["", "ema"])
def test_resume_equals_straight(make: Any, averaged: bool, tmp_path: Path) -> None:
    def run(*callbacks: Any, ckpt: Any = None) -> Any:
        averages = [EMAWeightAveraging(decay=0.8)] if averaged else []
        return fit(tmp_path, distilling(**make()), *averages, *callbacks, ckpt=ckpt)

    straight = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    for epoch in range(3):
        resumed = run(ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
        assert_same_state(
            resumed.lightning_module._kd.state_dict(), straight.lightning_module._kd.state_dict()
        )


def test_a_checkpoint_of_other_losses(trained: DistillationModule, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="goes on with its own losses. Found 3 in it and 1 in `loss`"):
        fit(tmp_path, distilling(student=Configured(8)), ckpt=tmp_path / "saved" / "last.ckpt")


def test_a_checkpoint_from_before_distillation_starts_it(tmp_path: Path) -> None:
    fit(tmp_path, Classifier(adamw), ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    run = fit(tmp_path, distilling(), ckpt=tmp_path / "last.ckpt")
    assert run.global_step == 16


def test_the_module_itself_loads_with_teacher_and_student(
    trained: DistillationModule, tmp_path: Path
) -> None:
    found = DistillationModule.load_from_checkpoint(
        tmp_path / "saved" / "last.ckpt", teacher=a_teacher(), student=Configured(8), loss=losses()
    )
    assert_same_state(found.state_dict(), trained.state_dict())


def test_resume_with_pruning_decay_and_a_penalty(tmp_path: Path) -> None:
    def run(*callbacks: Any, ckpt: Any = None) -> Any:
        ours = [
            so.IterativePruning(0.75, interval="step", begin=0.0, end=0.8, verbose=False),
            so.SparsityPenalty(so.L1(1e-4)),
            so.LRDecay(so.Cosine(minimum=0.1)),
        ]
        module = distilling(losses())
        return fit(tmp_path, module, *ours, *callbacks, ckpt=ckpt, accumulate_grad_batches=2), ours[0].masks

    straight, masks = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    for epoch in range(3):
        resumed, again = run(ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
        assert_same_state(again, masks)
