"""Stacking and gating: against scikit-learn, loops and closed forms; leaks are refused."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import Answers, Regressor, classifiers, fit, logits, numbers, rows
from support import CLASSES, Classifier, adamw, assert_same_state, dataset, loader, trainer
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_structopt.ensembles import (
    GatingNetwork,
    Held,
    MixedEnsemble,
    OutOfFold,
    ParallelEnsemble,
    SerialEnsemble,
    out_of_fold,
)
from lightning_structopt.ensembles.mixed.out_of_fold import overlaps

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
INPUTS, LABELS = dataset().tensors


def test_a_network_sees_probabilities_side_by_side() -> None:
    members, combiner = classifiers(2), nn.Linear(2 * CLASSES, CLASSES)
    found = MixedEnsemble(members, combiner)(INPUTS)
    features = torch.cat([member(INPUTS).softmax(1) for member in members], 1)
    torch.testing.assert_close(found, combiner(features).log_softmax(1))
    lines = [Regressor(seed=seed) for seed in range(3)]
    mixing = nn.Linear(3, 1)
    values = torch.stack([line(INPUTS) for line in lines], 1)
    found = MixedEnsemble(lines, mixing, "regression")(INPUTS)
    torch.testing.assert_close(found, mixing(values).squeeze(1))


def test_a_gate_gives_each_sample_its_own_weights() -> None:
    members, network = classifiers(3), nn.Linear(12, 3)
    found = MixedEnsemble(members, GatingNetwork(network))(INPUTS).exp()
    for row in range(32):
        weights = network(INPUTS[row]).softmax(0)
        expected = sum(
            w * m(INPUTS[row : row + 1]).softmax(1)[0] for w, m in zip(weights, members, strict=True)
        )
        torch.testing.assert_close(found[row], expected)
    lines = [Regressor(seed=seed) for seed in range(3)]
    values = torch.stack([line(INPUTS) for line in lines], 1)
    found = MixedEnsemble(lines, GatingNetwork(network), "regression")(INPUTS)
    torch.testing.assert_close(found, (network(INPUTS).softmax(1) * values).sum(1))


def test_a_gate_learns_whom_to_trust_where(tmp_path: Path) -> None:
    right = torch.tensor([0, 1, 2, 3] * 10)
    exact = 4 * nn.functional.one_hot(right, CLASSES).float()
    half = (torch.arange(40) < 20).unsqueeze(1)
    members = [
        Answers(torch.where(half, exact, logits(40, 1))),
        Answers(torch.where(half, logits(40, 2), exact)),
    ]

    class Place(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(1, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.line((inputs - 19.5) / 10)

    ensemble = MixedEnsemble(members, GatingNetwork(Place()), lr=0.3)
    fit(tmp_path, ensemble, data=rows(40, 10, right), max_epochs=20)
    found = trainer(tmp_path).validate(ensemble, rows(40, 10, right), verbose=False)[0]
    assert found["val_accuracy"] == 1
    assert max(found["0/val_accuracy"], found["1/val_accuracy"]) < 0.8


def test_stacking_by_scikit_learn(tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression, LogisticRegression

    members = classifiers(2)
    ensemble = MixedEnsemble(members, LogisticRegression(max_iter=500))
    ensemble.fit_combiner(loader())
    features = torch.cat([member(INPUTS).softmax(1) for member in members], 1).detach().numpy()
    expected = LogisticRegression(max_iter=500).fit(features, LABELS.numpy()).predict_proba(features)
    found = torch.cat(trainer(tmp_path).predict(ensemble, loader())).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    run = trainer(tmp_path)
    run.validate(ensemble, loader(), verbose=False)
    with pytest.raises(ValueError, match="Found a combiner of type `LogisticRegression`, which is none"):
        run.save_checkpoint(tmp_path / "never.ckpt")
    assert not (tmp_path / "never.ckpt").exists()
    with pytest.raises(ValueError, match="Fit an estimator of scikit-learn by `ensemble.fit_combiner"):
        fit(tmp_path, ensemble)
    lines, target = [Regressor(seed=seed) for seed in range(3)], numbers().dataset.tensors[1]
    ensemble = MixedEnsemble(lines, LinearRegression(), "regression")
    ensemble.fit_combiner(numbers())
    inputs = numbers().dataset.tensors[0]
    design = np.column_stack([*(line(inputs).detach().numpy() for line in lines), np.ones(32)])
    solution = np.linalg.lstsq(design, target.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ensemble(inputs).numpy(), design @ solution, rtol=1e-3, atol=1e-4)


def test_classes_that_an_estimator_never_saw() -> None:
    from sklearn.naive_bayes import GaussianNB

    ensemble = MixedEnsemble(classifiers(2), GaussianNB())
    chosen = LABELS != 1
    ensemble.fit_combiner(DataLoader(TensorDataset(INPUTS[chosen], LABELS[chosen]), 8))
    found = ensemble(INPUTS).exp()
    assert found.shape == (32, CLASSES)
    assert float(found[:, 1].max()) < 1e-5
    assert torch.isfinite(ensemble(INPUTS)).all()


def quick(root: Path) -> Any:
    return lambda: trainer(root, max_epochs=1)


def test_out_of_fold_predictions_are_by_members_that_never_saw_them(tmp_path: Path) -> None:
    seen: dict[int, set[float]] = {}

    class Remembers(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.setdefault(id(self), set()).update(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    factories = [lambda: Remembers(adamw), lambda: Remembers(adamw, hidden=4)]
    found = out_of_fold(factories, dataset(), quick(tmp_path), folds=4)
    assert found.outputs.shape == (2, 32, CLASSES)
    assert torch.equal(found.target, LABELS)
    assert [len(folds) for folds in found.members] == [4, 4]
    for row in range(32):
        for kind, folds in enumerate(found.members):
            strangers = [member for member in folds if float(INPUTS[row, 0]) not in seen[id(member)]]
            assert len(strangers) == 1
            torch.testing.assert_close(found.outputs[kind, row], strangers[0](INPUTS[row : row + 1])[0])
    batch = next(iter(DataLoader(found, 8)))
    assert isinstance(batch, Held)
    assert torch.equal(batch.inputs, INPUTS[:8])
    assert torch.equal(batch.outputs, found.outputs[:, :8].transpose(0, 1))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, CLASSES), lambda: GatingNetwork(nn.Linear(12, 2))], ids=["net", "gate"]
)
def test_combiners_are_trained_on_them_and_resume(make: Any, tmp_path: Path) -> None:
    folds = OutOfFold(
        torch.stack([logits(32, 1), 5 * torch.eye(CLASSES)[LABELS]]), LABELS, dataset(), [[], []]
    )
    members = classifiers(2)

    def mixed() -> MixedEnsemble:
        torch.manual_seed(0)
        return MixedEnsemble(copy.deepcopy(members), make(), trained_on=folds.dataset, lr=0.1)

    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = trainer(tmp_path, saved, max_epochs=8)
    straight.fit(mixed(), DataLoader(folds, 8), loader())
    assert straight.callback_metrics["train_loss"] < 0.6
    for name, value in straight.lightning_module.members.state_dict().items():
        assert torch.equal(value, mixed().members.state_dict()[name])
    resumed = trainer(tmp_path, max_epochs=8)
    resumed.fit(mixed(), DataLoader(folds, 8), loader(), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())


def test_training_on_the_members_own_data_is_refused(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    data = dataset()
    for same in (data, Subset(data, [1, 2, 3]), TensorDataset(*data.tensors)):
        ensemble = MixedEnsemble(classifiers(2), nn.Linear(8, CLASSES), trained_on=data)
        with pytest.raises(ValueError, match="members were not trained on.*Found samples of `trained_on`"):
            trainer(tmp_path).fit(ensemble, DataLoader(same, 8))
        with pytest.raises(ValueError, match="Found samples of `trained_on`"):
            MixedEnsemble(classifiers(2), LogisticRegression(), trained_on=data).fit_combiner(
                DataLoader(same, 8)
            )
    first, second = Subset(data, range(20)), Subset(data, range(20, 32))
    ensemble = MixedEnsemble(classifiers(2), nn.Linear(8, CLASSES), trained_on=first)
    trainer(tmp_path, max_epochs=1).fit(ensemble, DataLoader(second, 8))
    assert not overlaps(first, second)
    assert overlaps(Subset(first, [3]), Subset(data, [3, 25]))
    assert not overlaps(data, dataset(8))


def test_trees(tmp_path: Path) -> None:
    members = classifiers(4)
    inner = [ParallelEnsemble(members[:2]), SerialEnsemble(members[2:], threshold=0.5)]
    ensemble = MixedEnsemble(inner, nn.Linear(8, CLASSES))
    fit(tmp_path, ensemble, max_epochs=1, precision="bf16-mixed")
    assert [name for name, parameter in ensemble.named_parameters() if parameter.requires_grad] == [
        "combiner.weight",
        "combiner.bias",
    ]
    outer = ParallelEnsemble([ensemble, *members])
    assert trainer(tmp_path).validate(outer, loader(), verbose=False)[0]["0/val_accuracy"] >= 0


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (lambda: MixedEnsemble([], nn.Linear(8, 4)), ValueError, "at least one member"),
    "combiner": (lambda: MixedEnsemble(classifiers(2), "mean"), TypeError, "`combiner` must be a module"),
    "class": (lambda: MixedEnsemble(classifiers(2), GatingNetwork), TypeError, "Did you mean an object"),
    "task": (
        lambda: MixedEnsemble(classifiers(2), nn.Linear(8, 4), "both"),
        ValueError,
        "`task` must be 'classif",
    ),
    "size": (
        lambda: MixedEnsemble(classifiers(2), nn.Linear(8, 3))(INPUTS),
        ValueError,
        r"of shape \(32, 4\). Found \(32, 3\), from 8 features",
    ),
    "gate": (
        lambda: MixedEnsemble(classifiers(2), GatingNetwork(nn.Linear(12, 3)))(INPUTS),
        ValueError,
        r"of shape \(32, 2\). Found \(32, 3\)",
    ),
    "numbers": (
        lambda: MixedEnsemble([Regressor()], nn.Linear(1, 1))(INPUTS),
        ValueError,
        "Give `task=.regression.` for numbers",
    ),
    "by hand": (
        lambda: MixedEnsemble(classifiers(2), nn.Linear(8, 4)).fit_combiner(loader()),
        TypeError,
        "Train it by `trainer.fit",
    ),
    "folds": (
        lambda: out_of_fold([Classifier], dataset(), trainer, folds=1),
        ValueError,
        "must be at least 2",
    ),
    "samples": (lambda: out_of_fold([Classifier], dataset(3), trainer), ValueError, "3 samples for 5 folds"),
    "factories": (lambda: out_of_fold([], dataset(), trainer), ValueError, "Found 0 factories"),
}


@pytest.mark.parametrize(("make", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
