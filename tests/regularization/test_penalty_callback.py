"""`SparsityPenalty` in real training: the right map after the right steps, and nothing else."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, sgd, trainer, zeros
from torch import Tensor

from lightning_structopt.regularization import L1, L2, GroupLasso, SparsityPenalty
from lightning_structopt.schedules import Linear, Step, Warmup

BATCHES, WEIGHTS = 4, 12 * 16 + 16 * 4


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@dataclass(frozen=True)
class Recorder(L1):
    """An L1 that remembers the step sizes and shapes that it was called with."""

    steps: list[Any] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)

    def proximal(self, weight: Tensor, step: Any) -> Tensor:
        self.steps.append(step)
        self.shapes.append(weight.shape)
        return super().proximal(weight, step)


def fit(root: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> Any:
    run = trainer(root, *callbacks, **kwargs)
    run.fit(module, loader())
    return module


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.1},
    "accumulation": {"accumulate_grad_batches": 2, "max_epochs": 8},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("kind", [L1, GroupLasso, lambda strength: GroupLasso(strength, "channel")])
@pytest.mark.parametrize(("optimizer", "strength"), [(sgd, 0.03), (adamw, 0.1)])
@pytest.mark.parametrize("way", ["plain", "accumulation", "bf16-mixed", "bf16-true", "64-true"])
def test_weights_become_zero(tmp_path: Path, kind: Any, optimizer: Any, strength: float, way: str) -> None:
    module = fit(tmp_path, Classifier(optimizer), SparsityPenalty(kind(strength)), **WAYS[way])
    assert 10 < zeros(module) < WEIGHTS
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_equals_a_loop_written_by_hand(tmp_path: Path) -> None:
    module = fit(tmp_path, Classifier(plain_sgd), SparsityPenalty(L1(0.1)))
    twin = Classifier(plain_sgd).train()
    optimizer = twin.configure_optimizers()
    for _ in range(4):
        for inputs, labels in loader():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(twin(inputs), labels).backward()
            optimizer.step()
            for layer in (twin.net[0], twin.net[3]):
                weight = layer.weight.data
                shrunk = weight.abs() - 0.1 * 0.1
                layer.weight.data = torch.where(shrunk > 0, shrunk * weight.sign(), 0.0)
    torch.testing.assert_close(module.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
    assert zeros(module) == zeros(twin) > 10


@pytest.mark.parametrize("way", ["plain", "clip by norm", "accumulation", "bf16-mixed"])
@pytest.mark.parametrize("penalty", [L1(0.01), L2(0.1), GroupLasso(0.01)], ids=repr)
def test_gradient_mode_equals_a_penalty_in_the_loss(tmp_path: Path, way: str, penalty: Any) -> None:
    class Penalized(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + penalty.value(self.net[0].weight) + penalty.value(self.net[3].weight)

    expected = fit(tmp_path, Penalized(), **WAYS[way])
    module = fit(tmp_path, Classifier(), SparsityPenalty(penalty, mode="gradient"), **WAYS[way])
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)
    plain = fit(tmp_path, Classifier(), **WAYS[way])  # the penalty does make a difference
    assert (module.net[0].weight - plain.net[0].weight).abs().max() > 1e-3


def test_gradient_mode_under_maximization(tmp_path: Path) -> None:
    class Maximized(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return -super().training_step(batch, batch_idx)

    expected = fit(tmp_path, Classifier(plain_sgd), SparsityPenalty(L2(0.1), "gradient"))
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1, maximize=True)  # noqa: E731
    module = fit(tmp_path, Maximized(optimizer), SparsityPenalty(L2(0.1), "gradient"))
    torch.testing.assert_close(module.state_dict(), expected.state_dict())


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_only_the_chosen_parameters_are_touched(tmp_path: Path, mode: Any) -> None:
    plain = fit(tmp_path, Classifier(), max_steps=1)
    module = fit(tmp_path, Classifier(), SparsityPenalty(L1(0.1), mode, exclude="net.3.*"), max_steps=1)
    for name, value in module.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]) == (name != "net.0.weight")


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_one_map_for_each_optimizer_step(tmp_path: Path, accumulate: int) -> None:
    penalty = Recorder(0.1)
    fit(tmp_path, Classifier(plain_sgd), SparsityPenalty(penalty), accumulate_grad_batches=accumulate)
    steps = 4 * -(-BATCHES // accumulate)
    assert penalty.steps == [0.1] * 2 * steps
    assert penalty.shapes == [(16, 12), (4, 16)] * steps


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.float32), ("64-true", torch.float64)])
def test_penalties_are_computed_in_single_precision_at_least(
    tmp_path: Path, mode: Any, precision: Any, dtype: torch.dtype
) -> None:
    class Watching(L1):
        def proximal(self, weight: Tensor, step: Any) -> Tensor:
            dtypes.append(weight.dtype)
            return super().proximal(weight, step)

        def gradient(self, weight: Tensor) -> Tensor:
            dtypes.append(weight.dtype)
            return super().gradient(weight)

    dtypes: list[torch.dtype] = []
    fit(tmp_path, Classifier(), SparsityPenalty(Watching(0.1), mode), precision=precision)
    assert set(dtypes) == {dtype}


def test_the_step_follows_the_rate_and_the_momentum(tmp_path: Path) -> None:
    class Decaying(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.5)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    penalty = Recorder(0.1)
    fit(tmp_path, Decaying(), SparsityPenalty(penalty, include="net.0.*"), max_epochs=1)
    assert penalty.steps == pytest.approx([0.4, 0.2, 0.1, 0.05])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_strength_follows_a_schedule_of_optimizer_steps(tmp_path: Path, accumulate: int) -> None:
    penalty = Recorder(0.1)
    callback = SparsityPenalty(penalty, schedule=Linear(), include="net.0.*")
    fit(tmp_path, Classifier(plain_sgd), callback, max_epochs=accumulate, accumulate_grad_batches=accumulate)
    assert penalty.steps == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_the_subgradient_follows_a_schedule(tmp_path: Path) -> None:
    class Penalized(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            strength = 0.1 * 0.5 ** (self.trainer.global_step // 3)
            return super().training_step(batch, batch_idx) + strength * self.net[0].weight.square().sum() / 2

    callback = SparsityPenalty(L2(0.1), "gradient", schedule=Step(3, 0.5), include="net.0.*")
    expected, module = fit(tmp_path, Penalized()), fit(tmp_path, Classifier(), callback)
    torch.testing.assert_close(module.state_dict(), expected.state_dict())


def test_without_strength_nothing_changes(tmp_path: Path) -> None:
    class Never(Warmup):
        def __call__(self, t: float, horizon: float) -> float:
            return 0.0

    plain = fit(tmp_path, Classifier(adamw))
    for mode in ("proximal", "gradient"):
        for callback in (
            SparsityPenalty(L1(0.0), mode),
            SparsityPenalty(L1(1.0), mode, schedule=Never(1, then=Linear())),
        ):
            module = fit(tmp_path, Classifier(adamw), callback)
            assert_same_state(module.state_dict(), plain.state_dict())


def with_closures(module: ManualClassifier) -> ManualClassifier:
    def training_step(batch: Any, batch_idx: int) -> None:
        for index, optimizer in enumerate(module.optimizers(use_pl_optimizer=not module.raw)):

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = Classifier.training_step(module, batch, batch_idx)
                module.manual_backward(loss)
                return loss

            if index == 0 or batch_idx % 2 == 1:
                optimizer.step(closure=closure)

    module.training_step = training_step
    return module


@pytest.mark.parametrize("raw", [False, True], ids=["Lightning's optimizer", "raw optimizer"])
@pytest.mark.parametrize("closures", [False, True], ids=["no closure", "closure"])
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
def test_manual_optimization_with_two_optimizers(
    tmp_path: Path, mode: Any, raw: bool, closures: bool
) -> None:
    def module() -> ManualClassifier:
        made = ManualClassifier(raw=raw, optimizer=plain_sgd)
        return with_closures(made) if closures else made

    calls: list[torch.Size] = []

    class Counting(L2):
        def proximal(self, weight: Tensor, step: Any) -> Tensor:
            calls.append(weight.shape)
            return super().proximal(weight, step)

        def gradient(self, weight: Tensor) -> Tensor:
            calls.append(weight.shape)
            return super().gradient(weight)

    penalized = fit(tmp_path, module(), SparsityPenalty(Counting(0.5), mode))
    body, head = torch.Size([16, 12]), torch.Size([4, 16])
    assert calls == [body, body, head] * 8
    plain = fit(tmp_path, module())
    assert (penalized.net[0].weight.norm() < plain.net[0].weight.norm()).item()


def test_schedules_count_batches_under_manual_optimization(tmp_path: Path) -> None:
    penalty = Recorder(0.1)
    callback = SparsityPenalty(penalty, schedule=Linear(), include="net.3.*")
    fit(tmp_path, ManualClassifier(optimizer=plain_sgd), callback, max_epochs=2)
    assert penalty.steps == pytest.approx([0.1 * (1 - t / 8) for t in (1, 3, 5, 7)])


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_has_no_map(tmp_path: Path, fused: bool) -> None:
    class Overflowing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 2 else loss

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            before = self.net[0].weight.detach().clone()
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            moved.append(not torch.equal(before, self.net[0].weight))

    moved: list[bool] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=fused)  # noqa: E731
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = fit(tmp_path, Overflowing(optimizer), SparsityPenalty(L1(1.0)), plugins=plugin, max_epochs=1)
    assert moved == [True, True, False, True]
    assert zeros(module) > 10


def test_gradients_under_a_scaler_are_those_without(tmp_path: Path) -> None:
    modules = [
        fit(tmp_path, Classifier(), SparsityPenalty(L2(0.5), "gradient"), plugins=plugin)
        for plugin in (
            MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0)),
            MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", enabled=False)),
        )
    ]
    torch.testing.assert_close(modules[0].state_dict(), modules[1].state_dict(), rtol=1e-3, atol=1e-3)


def test_frozen_parameters_are_left_alone(tmp_path: Path) -> None:
    module = Classifier(adamw)
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.clone()
    fit(tmp_path, module, SparsityPenalty(L1(1.0)))
    assert torch.equal(module.net[0].weight, before)
    assert zeros(module, ["net.3.weight"]) > 0


def test_an_average_of_weights_is_taken_after_the_map(tmp_path: Path) -> None:
    module = fit(tmp_path, Classifier(), EMAWeightAveraging(decay=0.0), SparsityPenalty(L1(0.1)))
    twin = fit(tmp_path, Classifier(), SparsityPenalty(L1(0.1)))
    assert zeros(module) == zeros(twin) > 10


def logged(logger: CSVLogger) -> list[dict[str, float]]:
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["penalty/value"]]
    return [{key: float(row[key]) for key in ("penalty/value", "penalty/zeros")} for row in rows]


def test_value_and_zeros_are_logged_once_an_epoch(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            weight = pl_module.net[0].weight
            factor = 0.5 ** ((trainer.global_step - 1) // 6)
            value = factor * 0.1 * weight.abs().sum() + 0.2 / 2 * pl_module.net[3].weight.square().sum()
            expected.append((value.item(), zeros(pl_module) / WEIGHTS))

    expected: list[tuple[float, float]] = []
    logger = CSVLogger(tmp_path)
    callbacks = (
        SparsityPenalty(L1(0.1), schedule=Step(6, 0.5), exclude="net.3.*"),
        SparsityPenalty(L2(0.2), mode="gradient", include="net.3.*"),
    )
    fit(tmp_path, Classifier(), *callbacks, Watch(), logger=logger, log_every_n_steps=1)
    rows = logged(logger)
    assert [row["penalty/value"] for row in rows] == pytest.approx([value for value, _ in expected])
    assert [row["penalty/zeros"] for row in rows] == pytest.approx([share for _, share in expected])
    assert rows[-1]["penalty/zeros"] > 0


def test_barebones(tmp_path: Path) -> None:
    module = Classifier()
    module.log_dict = lambda *args, **kwargs: pytest.fail("logged, though there is nothing to log to")
    module.training_step = lambda batch, batch_idx: module(batch[0]).square().mean()
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        barebones=True,
        max_epochs=4,
        callbacks=[SparsityPenalty(L1(0.1))],
        default_root_dir=tmp_path,
    ).fit(module, loader())
    assert zeros(module) > 0


@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it meets in Lightning
def test_compiled_module(tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, torch.compile(module, backend="eager"), SparsityPenalty(L1(0.1)))
    assert zeros(module) > 0
