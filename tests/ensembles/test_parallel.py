"""`ParallelEnsemble`: its outputs, its steps, what it learns and what it refuses."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from nets import Answers, Regressor, classifiers, fit, logits, numbers, rows
from support import Classifier, adamw, assert_same_state, dataset, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_structopt.distillation import DistillationModule
from lightning_structopt.ensembles import ParallelEnsemble, weights_by_metric

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Saved(Classifier):
    """One that a checkpoint is enough to load."""

    def __init__(self, hidden: int = 16) -> None:
        super().__init__(adamw, hidden=hidden)
        self.save_hyperparameters()


class Result:
    def __init__(self, module: nn.Module) -> None:
        self.module, self.loads = module, 0

    def load(self) -> nn.Module:
        self.loads += 1
        return self.module


def test_members_of_every_kind(tmp_path: Path) -> None:
    module = Saved(hidden=8)
    fit(tmp_path, module, ModelCheckpoint(tmp_path, filename="saved"), max_epochs=1)
    result = Result(Classifier(hidden=24))
    inner = ParallelEnsemble([Classifier(hidden=4), nn.Linear(12, 4)])
    ensemble = ParallelEnsemble([(Saved, tmp_path / "saved.ckpt"), result, inner, nn.Linear(12, 4)])
    inputs = dataset().tensors[0]
    by_hand = [module.eval(), result.module, inner, ensemble.members[3]]
    expected = sum(member(inputs).softmax(1) for member in by_hand) / 4
    torch.testing.assert_close(ensemble(inputs).exp(), expected)
    assert result.loads == 1
    assert not any(p.requires_grad for m in ensemble.members for p in m.parameters())


def test_members_are_put_in_evaluation_mode_and_stay_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ensemble = ParallelEnsemble([classifiers(1)[0], Classifier(), Classifier()], "learned")
    assert [r for r in caplog.messages if "put in evaluation mode" in r] == [
        "Members in training mode are put in evaluation mode, as the ensemble doesn't train them: 1, 2."
    ]
    before = copy.deepcopy(ensemble.members.state_dict())
    fit(tmp_path, ensemble)
    ensemble.train()
    assert not any(part.training for part in ensemble.members.modules())
    ensemble.members[0].train()
    ensemble(dataset().tensors[0])
    assert not any(part.training for part in ensemble.members.modules())
    assert ensemble.training
    assert_same_state(ensemble.members.state_dict(), before)


def test_learned_weights_find_the_best_mixture(tmp_path: Path) -> None:
    right = torch.tensor([0, 1, 2, 3] * 8)
    good = nn.functional.one_hot(right, 4).float() * 2
    members = [Answers(logits(32, 5)), Answers(good), Answers(logits(32, 6))]
    ensemble = ParallelEnsemble(members, "learned", optimizer=lambda p: torch.optim.Adam(p, lr=0.3))
    run = fit(tmp_path, ensemble, data=rows(32, 8, right), max_epochs=20)
    weights = ensemble.weights()
    assert weights[1] > 0.9
    assert float(weights.sum().detach()) == pytest.approx(1)
    equal = ParallelEnsemble(members)
    scores = [trainer(tmp_path).validate(e, rows(32, 8, right), verbose=False)[0] for e in (ensemble, equal)]
    assert scores[0]["val_loss"] < scores[1]["val_loss"]
    assert run.callback_metrics["train_loss"] < 0.8


def test_gradients_of_learned_weights_are_those_by_hand() -> None:
    members = classifiers()
    ensemble = ParallelEnsemble(members, "learned")
    inputs, labels = dataset().tensors
    nn.init.normal_(ensemble.weights.scores)
    ensemble.loss(ensemble(inputs), labels).backward()
    scores = ensemble.weights.scores.detach().double().requires_grad_()
    probabilities = torch.stack([member.double()(inputs.double()).softmax(1) for member in members])
    mixed = (scores.softmax(0).view(-1, 1, 1) * probabilities).sum(0)
    (-mixed[range(32), labels].log().mean()).backward()
    torch.testing.assert_close(ensemble.weights.scores.grad.double(), scores.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [None, "learned"])
def test_members_are_trained_together(weights: Any, tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(
        [Classifier(seed=1), Classifier(seed=2, hidden=8)], weights, train_members=True
    )
    before = copy.deepcopy(ensemble.state_dict())
    run = fit(tmp_path, ensemble, max_epochs=10)
    assert run.callback_metrics["train_loss"] < 0.8
    for name in ("members.0.net.0.weight", "members.1.net.3.bias", "members.0.net.1.running_mean"):
        assert not torch.equal(ensemble.state_dict()[name], before[name])


def test_validation_logs_each_member(tmp_path: Path) -> None:
    members = classifiers()
    ensemble = ParallelEnsemble(members)
    found = trainer(tmp_path).validate(ensemble, loader(), verbose=False)[0]
    inputs, labels = dataset().tensors
    for index, member in enumerate(members):
        accuracy = float((member(inputs).argmax(1) == labels).float().mean())
        assert found[f"{index}/val_accuracy"] == pytest.approx(accuracy)
    expected = sum(member(inputs).softmax(1) for member in members) / 3
    assert found["val_accuracy"] == pytest.approx(float((expected.argmax(1) == labels).float().mean()))
    assert found["val_loss"] == pytest.approx(float(nn.functional.nll_loss(expected.log(), labels)), rel=1e-5)
    tested = trainer(tmp_path).test(ensemble, loader(), verbose=False)[0]
    assert {name.replace("test", "val"): value for name, value in tested.items()} == found


def test_metrics_of_ones_own(tmp_path: Path) -> None:
    metric = MulticlassAccuracy(4, average="micro")
    found = trainer(tmp_path).validate(
        ParallelEnsemble(classifiers(2), metrics={"top 1": metric}), loader(), verbose=False
    )[0]
    assert found.keys() == {"val_loss", "val_top_1", "0/val_top_1", "1/val_top_1"}
    assert metric.update_count == 0


def test_predictions_are_probabilities_or_values(tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(classifiers())
    for data in (loader(), DataLoader(dataset().tensors[0], 8)):
        found = torch.cat(trainer(tmp_path).predict(ensemble, data))
        torch.testing.assert_close(found, ensemble(dataset().tensors[0]).exp())
    members = [Regressor(seed=seed) for seed in range(4)]
    inputs = numbers().dataset.tensors[0]
    values = torch.stack([member(inputs) for member in members]).detach()
    found = torch.cat(trainer(tmp_path).predict(ParallelEnsemble(members, combine="median"), numbers()))
    torch.testing.assert_close(found, torch.quantile(values, 0.5, dim=0))
    mean, variance = ParallelEnsemble(members, combine="mean").predict_with_variance(inputs)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.var(0, unbiased=False))


def test_regression_is_scored_and_weighed(tmp_path: Path) -> None:
    members = [Regressor(seed=seed) for seed in range(3)]
    ensemble = ParallelEnsemble(members, "learned", "mean", lr=0.1)
    fit(tmp_path, ensemble, data=numbers(), max_epochs=15)
    inputs, target = numbers().dataset.tensors
    found = trainer(tmp_path).validate(ensemble, numbers(), verbose=False)[0]
    errors = [float((member(inputs) - target).square().mean()) for member in members]
    assert [found[f"{index}/val_MSE"] for index in range(3)] == pytest.approx(errors)
    assert found["val_MSE"] == pytest.approx(found["val_loss"])
    equal = sum(member(inputs) for member in members) / 3
    assert found["val_MSE"] < float((equal - target).square().mean())


def test_resume_equals_straight(tmp_path: Path) -> None:
    def make() -> ParallelEnsemble:
        return ParallelEnsemble(classifiers(), "learned")

    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = fit(tmp_path, make(), saved)
    resumed = fit(tmp_path, make(), ckpt=tmp_path / "epoch=1.ckpt")
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
    path = tmp_path / "epoch=3.ckpt"
    again = ParallelEnsemble.load_from_checkpoint(
        path, members=classifiers(), weights="learned", weights_only=True
    )
    assert_same_state(again.state_dict(), straight.lightning_module.state_dict())


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("train_members", [True, False])
def test_precision_and_accumulation(options: dict[str, Any], train_members: bool, tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(classifiers(), "learned", train_members=train_members)
    run = fit(tmp_path, ensemble, **options)
    assert math.isfinite(run.callback_metrics["val_loss"])
    assert ensemble(dataset().tensors[0]).dtype == torch.float32


@pytest.mark.parametrize("combine", ["probabilities", "vote"])
def test_is_a_teacher(combine: Any, tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(classifiers(), combine=combine)
    student = Classifier(adamw, hidden=8)
    run = fit(tmp_path, DistillationModule(ensemble.as_teacher(), student, alpha=1.0), max_epochs=15)
    inputs = dataset().tensors[0]
    same = student.eval()(inputs).argmax(1) == ensemble(inputs).argmax(1)
    assert float(same.float().mean()) > 0.7  # chance is 0.25
    assert math.isfinite(run.callback_metrics["kd/SoftTarget"])


def test_copies_and_pickles() -> None:
    ensemble = ParallelEnsemble(classifiers(), [0.5, 0.25, 0.25], stack=True)
    inputs = dataset().tensors[0]
    expected = ensemble(inputs)
    for twin in (copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        torch.testing.assert_close(twin(inputs), expected)
        twin.members[0].net[0].weight.zero_()
        assert not torch.allclose(twin(inputs), expected)
    torch.testing.assert_close(ensemble(inputs), expected)


def test_weights_by_metric() -> None:
    right = torch.zeros(10, dtype=torch.long)
    tables = [torch.eye(2)[[0] * hits + [1] * (10 - hits)] for hits in (8, 4, 4)]
    members, data = [Answers(table) for table in tables], rows(10, 3, right)
    accuracy = MulticlassAccuracy(2, average="micro")
    assert weights_by_metric(members, data, accuracy) == pytest.approx([0.5, 0.25, 0.25])
    assert weights_by_metric(members, data, accuracy, sharpness=2) == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    from torchmetrics.regression import MeanSquaredError

    numbers = [Answers(torch.full((10,), value)) for value in (1.0, 2.0, 3.0)]
    inverse = [1 / 1, 1 / 4, 1 / 9]
    found = weights_by_metric(numbers, rows(10, 3, torch.zeros(10)), MeanSquaredError())
    assert found == pytest.approx([share / sum(inverse) for share in inverse])
    exact = [Answers(torch.zeros(10)), *numbers]
    assert weights_by_metric(exact, rows(10, 3, torch.zeros(10)), MeanSquaredError()) == [1, 0, 0, 0]


class Broken(Classifier):
    def __init__(self, hidden: int = 9) -> None:
        super().__init__(hidden=hidden)


def two() -> list[nn.Module]:
    return [Classifier(), Classifier()]


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: ParallelEnsemble([]), ValueError, "at least one member. Found none"),
    "a class": (lambda: ParallelEnsemble([Classifier]), TypeError, r"Found `members\[0\] = <class"),
    "no file": (
        lambda: ParallelEnsemble([(Saved, "nowhere.ckpt")]),
        FileNotFoundError,
        "none at `nowhere.ckpt`",
    ),
    "a net": (
        lambda: ParallelEnsemble([(nn.Linear, "nowhere.ckpt")]),
        TypeError,
        "no `load_from_checkpoint`",
    ),
    "sum": (lambda: ParallelEnsemble(two(), [0.5, 0.6]), ValueError, "must sum to 1. .* sum to 1.1. Divide"),
    "negative": (lambda: ParallelEnsemble(two(), [1.5, -0.5]), ValueError, r"must be in \[0, inf\)"),
    "count": (lambda: ParallelEnsemble(two(), [1.0]), ValueError, "each of 2 members. Found 1"),
    "word": (lambda: ParallelEnsemble(two(), "best"), ValueError, "must be 'learned' or None"),
    "way": (
        lambda: ParallelEnsemble(two(), combine="sum"),
        ValueError,
        "`combine` must be 'probabilities' or",
    ),
    "stack": (lambda: ParallelEnsemble(two(), stack="yes"), ValueError, "`stack` must be 'auto' or"),
    "vote": (lambda: ParallelEnsemble(two(), "learned", "vote"), ValueError, "has no gradients"),
    "trained vote": (
        lambda: ParallelEnsemble(two(), combine="vote", train_members=True),
        ValueError,
        "no gradie",
    ),
    "rates": (lambda: ParallelEnsemble(two(), lr=1.0, optimizer=adamw), ValueError, "`lr` and `optimizer`"),
    "rate": (lambda: ParallelEnsemble(two(), lr=0.0), ValueError, r"`lr` must be in \(0"),
    "one by one": (
        lambda: ParallelEnsemble(two(), stack=True, train_members=True),
        ValueError,
        "trained one by one",
    ),
    "others": (
        lambda: ParallelEnsemble([Classifier(), Classifier(hidden=3)], stack=True),
        ValueError,
        "another architecture in member 1",
    ),
    "classes": (
        lambda: ParallelEnsemble([nn.Linear(12, 4), nn.Linear(12, 5)])(dataset().tensors[0]),
        ValueError,
        r"Found \(32, 4\) of member 0, \(32, 5\) of member 1",
    ),
    "variance": (
        lambda: ParallelEnsemble(two()).predict_with_variance(dataset().tensors[0]),
        ValueError,
        "variance is one of numbers",
    ),
    "both": (
        lambda: ParallelEnsemble(two())(torch.ones(1), other=torch.ones(1)),
        TypeError,
        "positional arguments or with named",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_a_checkpoint_of_another_class(tmp_path: Path) -> None:
    fit(tmp_path, Saved(hidden=8), ModelCheckpoint(tmp_path, filename="saved"), max_epochs=1)

    class Other(Saved):
        def __init__(self, hidden: int = 8) -> None:
            super().__init__(hidden)
            self.net.append(nn.Linear(4, 4))

    with pytest.raises(
        ValueError, match=r"must be of its class.*saved.ckpt`, which `Other` can't load: .*Missing key"
    ):
        ParallelEnsemble([(Other, tmp_path / "saved.ckpt")])


def test_nothing_to_train_is_said_before_the_first_step(tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(classifiers())
    with pytest.raises(ValueError, match='frozen members and fixed weights. Give `weights="learned"`'):
        fit(tmp_path, ensemble)
    with pytest.raises(TypeError, match="need a target"):
        trainer(tmp_path).validate(ensemble, DataLoader(dataset().tensors[0], 8), verbose=False)
    with pytest.raises(TypeError, match="must be a pair of inputs and target. Found a `dict`"):
        trainer(tmp_path).predict(ensemble, DataLoader([{"inputs": torch.ones(12)}]))


def test_batches_and_inputs_of_other_forms(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> Any:
            return {"logits": self.factor * (one + other)}

    def read(batch: Any) -> Any:
        return {"one": batch["a"], "other": batch["b"]}, batch["y"]

    ensemble = ParallelEnsemble([Sum(1.0), Sum(3.0)], combine="mean", read=read)
    data = DataLoader([{"a": torch.ones(3), "b": torch.ones(3), "y": torch.full((3,), 4.0)}] * 2, 2)
    assert trainer(tmp_path).validate(ensemble, data, verbose=False)[0]["val_MSE"] == 0
    assert torch.equal(ensemble(torch.ones(1), torch.ones(1)), torch.full((1,), 4.0))
    assert torch.equal(ensemble(one=torch.ones(1), other=torch.ones(1)), torch.full((1,), 4.0))


def test_averages_of_weights_are_kept_beside(tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(classifiers(), "learned", lr=0.5)
    seen: list[torch.Tensor] = []

    class Watched(EMAWeightAveraging):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
            seen.append(pl_module.weights.scores.detach().clone())

    fit(tmp_path, ensemble, Watched(decay=0.5))
    average = seen[0]
    for value in seen[1:]:
        average = 0.5 * average + 0.5 * value
    torch.testing.assert_close(ensemble.weights.scores.detach(), average, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_dim", [1, -1])
def test_pixels_and_tokens(class_dim: int, tmp_path: Path) -> None:
    class Places(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.line = nn.Linear(3, 4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.line(inputs).movedim(-1, class_dim)

    members = [Places(seed) for seed in range(2)]
    ensemble = ParallelEnsemble(members, "learned", class_dim=class_dim, lr=0.1)
    inputs, labels = torch.randn(8, 6, 3), torch.arange(48).reshape(8, 6) % 4
    data = DataLoader(TensorDataset(inputs, labels), 4)
    fit(tmp_path, ensemble, data=data, max_epochs=1)
    found = trainer(tmp_path).validate(ensemble, data, verbose=False)[0]
    weights = ensemble.weights().detach()
    probabilities = sum(w * m.line(inputs).softmax(-1) for w, m in zip(weights, members, strict=True))
    expected = -probabilities.gather(-1, labels.unsqueeze(-1)).log().mean()
    assert found["val_loss"] == pytest.approx(float(expected), rel=1e-4)
    right = (probabilities.argmax(-1) == labels).float().mean()
    assert found["val_accuracy"] == pytest.approx(float(right))


def test_weights_of_half_precision(tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(classifiers(), "learned")
    fit(tmp_path, ensemble, precision="bf16-true")
    output = ensemble(dataset().tensors[0].bfloat16())
    assert ensemble.weights().dtype == torch.bfloat16
    torch.testing.assert_close(output.exp().sum(1), torch.ones(32))
