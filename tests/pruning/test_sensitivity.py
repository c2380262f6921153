import csv
import json
from pathlib import Path

import pytest
import torch
from support import Classifier, assert_same_state, dataset, loader, trainer, zeros
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_structopt.pruning import (
    Calibration,
    IterativePruning,
    Taylor,
    Unstructured,
    prune,
    sensitivity,
)
from lightning_structopt.pruning.sensitivity import Sensitivity


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.detach(), targets)


def test_is_the_metric_with_that_layer_pruned_by_itself() -> None:
    inputs, targets = dataset().tensors
    found = sensitivity(Classifier(), loader(), loss, (0.5, 0.9), mode="min", progress=False)
    assert found.baseline == pytest.approx(float(loss(Classifier().eval()(inputs), targets)))
    for name in ("net.0.weight", "net.3.weight"):
        for sparsity, metric in zip((0.5, 0.9), found.metrics[name], strict=True):
            module = Classifier().eval()
            prune(module, sparsity, include=name)
            assert metric == pytest.approx(float(loss(module(inputs), targets)))


def test_takes_a_torchmetric_and_leaves_the_module_as_it_was() -> None:
    module = Classifier()
    module.net[1].eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = sensitivity(module, loader(), MulticlassAccuracy(4, average="micro"), (0.9,), progress=False)
    assert 0 <= found.baseline <= 1
    assert_same_state(dict(module.state_dict()), before)
    assert module.training
    assert not module.net[1].training


def test_takes_a_criterion_that_needs_data() -> None:
    criterion = Taylor(calibration=Calibration(loader()))
    found = sensitivity(Classifier(), loader(), loss, (0.5,), mode="min", criterion=criterion, progress=False)
    by_magnitude = sensitivity(Classifier(), loader(), loss, (0.5,), mode="min", progress=False)
    assert found.baseline == by_magnitude.baseline
    assert found.metrics != by_magnitude.metrics


def test_the_module_is_restored_when_the_metric_fails() -> None:
    module, calls = Classifier(), []

    def fails(outputs: torch.Tensor, targets: torch.Tensor) -> float:
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("metric")
        return 0.0

    with pytest.raises(RuntimeError, match="metric"):
        sensitivity(module, loader(), fails, (0.9,), progress=False)
    assert zeros(module) == 0
    assert module.training


MADE_UP = Sensitivity(
    baseline=0.9,
    sparsities=(0.5, 0.9),
    metrics={"robust": (0.9, 0.88), "fragile": (0.7, 0.1)},
    sizes={"robust": 1000, "fragile": 1000},
    mode="max",
)


def test_budget_makes_all_layers_lose_alike() -> None:
    """Robust loses 0.05 a unit beyond 0.5 and fragile 0.4: equal losses and a mean of 0.45 give 0.5 + 8f + f = 0.9."""
    shares = MADE_UP.budget(0.45).sparsities
    assert shares == pytest.approx({"robust": 0.5 + 8 * 0.4 / 9, "fragile": 0.4 / 9})


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9])
def test_budget_is_the_sparsity_asked_for(sparsity: float) -> None:
    shares = MADE_UP.budget(sparsity).sparsities
    assert sum(shares.values()) / 2 == pytest.approx(sparsity, abs=1e-6)


def test_budget_beyond_what_was_tried() -> None:
    with pytest.raises(ValueError, match=r"at most the largest that was tried. Found `sparsity = 0.95`"):
        MADE_UP.budget(0.95)


def test_budget_goes_into_training(tmp_path: Path) -> None:
    found = sensitivity(Classifier(), loader(), loss, mode="min", progress=False)
    budget = found.budget(0.8)
    pattern = Unstructured("layer", budget)
    module = Classifier()
    trainer(tmp_path, IterativePruning(0.8, pattern=pattern, interval="step", verbose=False)).fit(
        module, loader()
    )
    for name, share in budget.sparsities.items():
        assert zeros(module, [name]) == round(share * found.sizes[name])


def test_table_files_and_plot(tmp_path: Path) -> None:
    assert [str(column.header) for column in MADE_UP.table().columns] == ["parameter", "50%", "90%"]
    MADE_UP.to_csv(tmp_path / "s.csv")
    assert list(csv.reader((tmp_path / "s.csv").read_text().splitlines()))[1] == ["robust", "0.9", "0.88"]
    MADE_UP.to_json(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["baseline"] == 0.9
    MADE_UP.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("sparsities", "message"),
    [((), "`sparsities` must hold at least one"), ((0.5, 1.0), r"`sparsities` must be in \(0, 1\). Found")],
)
def test_bad_sparsities(sparsities: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sensitivity(Classifier(), loader(), loss, sparsities, progress=False)
