"""The student is trained as by hand, and what it does of its own still happens."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from students import ByHand, a_teacher, distilling, fit
from support import Classifier, adamw, assert_same_state, loader, sgd, trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

import lightning_structopt as so
from lightning_structopt.distillation import DistillationModule
from lightning_structopt.distillation.losses.classes import DKD
from lightning_structopt.distillation.losses.features import FeatureMSE, Hint
from lightning_structopt.distillation.losses.logits import LogitMSE, SoftTarget

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


def half(step: int) -> tuple[float, float]:
    return 0.5, 0.5


CASES: dict[str, tuple[Any, dict[str, Any], Any, dict[str, Any]]] = {
    "default": (SoftTarget, {}, half, {}),
    "alpha": (LogitMSE, {"alpha": 0.9}, lambda step: (1 - 0.9, 0.9), {}),
    "weight": (SoftTarget, {"weight": 2.0}, lambda step: (1.0, 2.0), {}),
    "labels": (DKD, {}, half, {}),
    "schedule": (
        SoftTarget,
        {"alpha": 0.8, "schedule": so.Linear()},
        lambda step: (1 - 0.8 * (1 - step / 16), 0.8 * (1 - step / 16)),
        {},
    ),
    "bf16": (SoftTarget, {}, half, {"precision": "bf16-mixed"}),
    "accumulation and clipping": (
        SoftTarget,
        {},
        half,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ),
}


@pytest.mark.parametrize(("loss", "arguments", "factors", "options"), CASES.values(), ids=CASES)
def test_weights_are_those_of_distillation_by_hand(
    loss: Any, arguments: Any, factors: Any, options: Any, tmp_path: Path
) -> None:
    by_hand = ByHand(a_teacher(), loss(), factors, optimizer=adamw)
    fit(tmp_path, by_hand, **options)
    module = distilling(loss(), **arguments)
    fit(tmp_path, module, **options)
    assert_same_state(module.state_dict(), by_hand.state_dict())


def test_the_teachers_weights_statistics_and_place_stay(tmp_path: Path) -> None:
    teacher = a_teacher()
    before = copy.deepcopy(teacher.state_dict())
    module = DistillationModule(teacher, Classifier(adamw))
    run = fit(tmp_path, module)
    assert_same_state(teacher.state_dict(), before)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert not any(part._forward_hooks for part in [*teacher.modules(), *module.student.modules()])
    mine = {id(p) for p in teacher.parameters()}
    assert not mine & {id(p) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert not mine & {id(p) for p in module.parameters()}


def test_the_teacher_is_in_eval_mode_whoever_changes_it(tmp_path: Path) -> None:
    class Stray(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            pl_module.train()
            pl_module.teacher.train()

    module, disturbed = distilling(), distilling()
    fit(tmp_path, module)
    fit(tmp_path, disturbed, Stray())
    assert_same_state(disturbed.teacher.state_dict(), a_teacher().state_dict())  # its running statistics too
    assert_same_state(disturbed.state_dict(), module.state_dict())


def test_own_keys_and_kd_are_logged(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "best", monitor="val_acc", mode="max", filename="{val_acc:.2f}")
    monitor = LearningRateMonitor("epoch")
    module = distilling()
    run = fit(
        tmp_path,
        module,
        saved,
        monitor,
        EarlyStopping("val_acc", mode="max", patience=9),
        logger=CSVLogger(tmp_path),
    )
    metrics = run.callback_metrics
    assert metrics.keys() >= {"train_loss", "val_acc", "kd/task", "kd/SoftTarget", "kd/agreement"}
    assert "val_acc=" in saved.best_model_path
    assert "lr-AdamW" in monitor.lrs
    run.test(module, loader(), verbose=False)
    assert run.callback_metrics.keys() == {"val_acc"}


def test_logged_values_are_means_over_the_epochs_samples(tmp_path: Path) -> None:
    student = Classifier(lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    teacher = a_teacher()
    module = DistillationModule(teacher, student, LogitMSE())
    run = trainer(tmp_path, max_epochs=1)
    data = loader(samples=20, batch_size=8)  # 8, 8 and 4
    run.fit(module, data)
    gaps, agree, tasks = [], [], []
    twin = Classifier().train()
    for inputs, labels in data:
        ours, theirs = twin(inputs), teacher(inputs)
        gaps.append((ours - theirs).square().sum(1))
        agree.append((ours.argmax(1) == theirs.argmax(1)).float())
        tasks.append(nn.functional.cross_entropy(ours, labels, reduction="none"))
    for name, parts in (("LogitMSE", gaps), ("agreement", agree), ("task", tasks)):
        assert run.callback_metrics[f"kd/{name}"] == pytest.approx(torch.cat(parts).mean().item(), abs=1e-5)


def test_steps_are_logged_where_a_logger_writes(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(tmp_path, distilling(), logger=logger, log_every_n_steps=3)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("kd/SoftTarget_step")
    assert sum(row.split(",")[place] != "" for row in rows[1:]) == 16 // 3
    assert {"kd/task", "kd/SoftTarget", "kd/agreement"} <= set(rows[0].split(","))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by `self.log`, which is compiled too
@pytest.mark.parametrize("what", ["student", "part", "whole"])
def test_compiled(what: str, tmp_path: Path) -> None:
    short = {"limit_train_batches": 2, "limit_val_batches": 0}
    plain = distilling()
    fit(tmp_path, plain, max_epochs=1, **short)
    student = Classifier(adamw)
    if what == "part":
        student.net.compile(backend="eager")
    given = torch.compile(student, backend="eager") if what == "student" else student
    module = distilling(student=given)
    fit(
        tmp_path, torch.compile(module, backend="eager") if what == "whole" else module, max_epochs=1, **short
    )
    torch.testing.assert_close(student.state_dict(), plain.state_dict())


def test_tools_that_look_at_the_module_find_the_student(tmp_path: Path) -> None:
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.lr = 0.1
            self.example_input_array = torch.ones(2, 12)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    module = distilling(student=Tuned())
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-2, num_training_steps=30, early_stop_threshold=None)
    run = fit(tmp_path, module, finder, max_epochs=9)
    assert module.student.lr == run.optimizers[0].param_groups[0]["lr"] <= 1e-2
    summary, alone = ModelSummary(module), ModelSummary(Tuned())
    assert summary.total_parameters == alone.total_parameters
    assert summary.layer_names == alone.layer_names
    assert summary.out_sizes == alone.out_sizes


def test_a_barebones_trainer_logs_nothing(tmp_path: Path) -> None:
    class Quiet(Classifier):
        def log(self, *args: Any, **kwargs: Any) -> None:
            return None

    run = pl.Trainer(barebones=True, max_epochs=1, accelerator="cpu")
    run.fit(DistillationModule(a_teacher(), Quiet()), loader())
    assert not run.callback_metrics


class Outputs(Classifier):
    """Returns more than a loss, and now and then nothing."""

    def __init__(self, skips: bool = False) -> None:
        super().__init__(adamw)
        self.skips, self.seen = skips, []

    def training_step(self, batch: Any) -> Any:  # Lightning lets the index out
        loss = super().training_step(batch, 0)
        return None if self.skips and self.global_step == 0 else {"loss": loss, "more": loss.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs)


def test_a_student_that_returns_a_mapping_or_nothing(tmp_path: Path) -> None:
    plain = distilling()
    fit(tmp_path, plain, max_epochs=1)
    module = distilling(student=Outputs())
    fit(tmp_path, module, max_epochs=1)
    assert_same_state(module.state_dict(), plain.state_dict())
    assert all(seen["more"] != seen["loss"] for seen in module.student.seen)
    skipping = distilling(student=Outputs(skips=True))
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer(tmp_path, max_epochs=1).fit(skipping, loader())
    assert [bool(seen) for seen in skipping.student.seen] == [False, True, True, True]


class Mine(DistillationModule):
    def distillation_loss(self, student_out: Any, teacher_out: Any, batch: Any) -> Tensor:
        return (student_out - teacher_out).square().sum(1).mean()


class MineByPlace(DistillationModule):
    def distillation_loss(self, student_out: Any, teacher_out: Any, batch: Any) -> Tensor:
        return (student_out["logits"] - teacher_out["logits"]).square().sum(1).mean()


@pytest.mark.parametrize("kind", [Mine, MineByPlace])
def test_a_subclass_with_a_loss_of_its_own(kind: Any, tmp_path: Path) -> None:
    loss = {"logits": SoftTarget(), "net.1": FeatureMSE()} if kind is MineByPlace else None
    teacher = a_teacher(16)
    module = kind(teacher, Classifier(adamw), loss)
    fit(tmp_path, module)
    expected = DistillationModule(teacher, Classifier(adamw), LogitMSE())
    fit(tmp_path, expected)
    assert_same_state(module.state_dict(), expected.state_dict())


class Scheduled(Classifier):
    """With a scheduler that minds its groups, on a part of its parameters."""

    def __init__(self, scheduler: str) -> None:
        super().__init__(sgd)
        self.scheduler = scheduler

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [{"params": self.net[0].parameters(), "lr": 0.01}, {"params": self.net[3].parameters()}], lr=0.1
        )
        make = {
            "lambda": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.9**t),
            "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=16),
            "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16),
        }[self.scheduler]
        return [optimizer], [{"scheduler": make(), "interval": "step"}]


def hinting() -> dict[Any, Any]:
    return {"logits": SoftTarget(), ("net.0", "net.0"): (0.5, Hint())}


@pytest.mark.parametrize("scheduler", ["lambda", "one cycle", "cosine"])
def test_adapters_train_in_the_students_optimizer_and_resume(scheduler: str, tmp_path: Path) -> None:
    def run(*callbacks: pl.Callback, ckpt: Any = None) -> tuple[DistillationModule, pl.Trainer]:
        module = distilling(hinting(), Scheduled(scheduler))
        return module, fit(tmp_path, module, *callbacks, ckpt=ckpt)

    straight, first = run(ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"))
    adapter = straight._kd.comparison.pairs[1].loss.adapter
    groups = first.optimizers[0].param_groups
    assert [len(group["params"]) for group in groups] == [2, 4]  # joined the faster group
    assert any(parameter is adapter.weight for parameter in groups[1]["params"])
    fresh = Hint()
    fresh.adapt(torch.zeros(1, 16), torch.zeros(1, 24))
    assert not torch.equal(adapter.weight, fresh.adapter.weight)
    for epoch in range(3):
        resumed, second = run(ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.state_dict(), straight.state_dict())
        assert_same_state(resumed._kd.state_dict(), straight._kd.state_dict())
        assert_same_state(second.optimizers[0].state_dict(), first.optimizers[0].state_dict())


def test_adapters_are_seen_by_no_one_else(tmp_path: Path) -> None:
    pruning = so.IterativePruning(0.5, interval="step", verbose=False)
    average = EMAWeightAveraging(decay=0.5)
    module = distilling(hinting())
    fit(tmp_path, module, pruning, average)
    assert pruning.masks.keys() == {"net.0.weight", "net.3.weight"}
    assert pruning.sparsity == pytest.approx(0.5, abs=1 / 256)
    assert module.state_dict().keys() == Classifier().state_dict().keys()
    assert average._average_model.module.state_dict().keys() == Classifier().state_dict().keys()


def test_fit_twice_with_one_object(tmp_path: Path) -> None:
    module = distilling(hinting())
    fit(tmp_path, module)
    second = fit(tmp_path, module)
    assert [len(group["params"]) for group in second.optimizers[0].param_groups] == [8]
    assert not any(part._forward_hooks for part in module.student.modules())


def test_works_again_after_an_exception(tmp_path: Path) -> None:
    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            raise RuntimeError("crash")

    module = distilling(hinting())
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, module, Crash())
    run = fit(tmp_path, module)
    assert run.global_step == 16


def test_metrics_of_the_student_are_logged_as_its_own(tmp_path: Path) -> None:
    class WithMetric(Classifier):
        def __init__(self) -> None:
            super().__init__(adamw)
            self.accuracy = MulticlassAccuracy(4, average="micro")

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.accuracy(self(batch[0]), batch[1])
            self.log("val_acc", self.accuracy)

    module, alone = distilling(student=WithMetric(), alpha=0.0), WithMetric()
    wrapped, plain = fit(tmp_path, module), fit(tmp_path, alone)
    assert wrapped.callback_metrics["val_acc"] == plain.callback_metrics["val_acc"]
    assert_same_state(module.state_dict(), alone.state_dict())


def test_different_inputs_for_teacher_and_student(tmp_path: Path) -> None:
    small = Classifier(adamw)

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(6, 4)

        def forward(self, half: Tensor, *, scale: float) -> Tensor:
            assert half.shape[1] == 6
            return self.body(half) * scale

    module = DistillationModule(
        Narrow(), small, teacher_input=lambda batch: {"half": batch[0][:, :6], "scale": 2.0}
    )
    assert fit(tmp_path, module).global_step == 16


def test_a_teacher_of_its_own_precision(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    teacher = a_teacher()
    teacher.net[3].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for precision, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        seen.clear()
        fit(tmp_path, DistillationModule(teacher, Classifier(), teacher_precision=precision), max_epochs=1)
        assert set(seen) == {expected}
    seen.clear()
    module = DistillationModule(teacher, Classifier(), teacher_precision="float32")
    fit(tmp_path, module, max_epochs=1, precision="bf16-true")
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("optimizer", [adamw, sgd, torch.optim.LBFGS], ids=["adamw", "sgd", "lbfgs"])
def test_adapters_at_any_precision_by_any_optimizer(precision: Any, optimizer: Any, tmp_path: Path) -> None:
    module = distilling(hinting(), Classifier(optimizer))
    run = fit(tmp_path, module, max_epochs=1, precision=precision)
    adapter = module._kd.comparison.pairs[1].loss.adapter
    fresh = Hint()
    fresh.adapt(torch.zeros(1, 16), torch.zeros(1, 24))
    assert not torch.equal(adapter.weight, fresh.adapter.weight)
    assert run.callback_metrics["kd/Hint"].isfinite()


def test_with_decay_penalty_and_pruning(tmp_path: Path) -> None:
    module = distilling()
    fit(
        tmp_path,
        module,
        so.IterativePruning(0.75, interval="step", include="net.*", verbose=False),
        so.SparsityPenalty(so.L1(1e-4)),
        so.LRDecay(so.Cosine()),
    )
    zeros = sum(int((p == 0).sum()) for p in module.parameters() if p.ndim > 1)
    assert zeros >= 0.75 * 256


def test_validate_test_and_predict_without_fit(tmp_path: Path) -> None:
    module = distilling()
    run = trainer(tmp_path)
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    assert len(run.predict(module, loader())) == 4


def test_fast_dev_run(tmp_path: Path) -> None:
    fit(tmp_path, distilling(hinting()), fast_dev_run=True)


def test_a_step_without_a_trainer() -> None:
    module = distilling()
    student, teacher = module.student, module.teacher
    batch = next(iter(loader()))
    with pytest.warns(UserWarning, match="self.log"):
        total = module.training_step(batch, 0)
    ours, theirs = student(batch[0]), teacher(batch[0])
    expected = (nn.functional.cross_entropy(ours, batch[1]) + SoftTarget()(ours, theirs)) / 2
    assert total.item() == pytest.approx(expected.item())
