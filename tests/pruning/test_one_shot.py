"""`prune` with every criterion, and what `advance` asks for."""

import copy
from typing import Any

import pytest
import torch
from support import FEATURES, Classifier, dataset, zeros
from torch import nn
from torch.utils.data import DataLoader

from lightning_structopt.pruning import Magnitude, Neurons, Unstructured, prune
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.criteria import Evidence
from lightning_structopt.pruning.curvature import HessianDiagonal
from lightning_structopt.pruning.filter_criteria import BatchNormScale, GeometricMedian
from lightning_structopt.pruning.gradient_criteria import GradientSquared, Taylor
from lightning_structopt.pruning.jacobian import JacobianImportance
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.one_shot import advance
from lightning_structopt.pruning.wanda import Wanda
from lightning_structopt.pruning.weight_criteria import LAMP, Random

CALIBRATION = Calibration(DataLoader(dataset(), batch_size=8), limit=2)
CRITERIA = [
    Magnitude(),
    Magnitude(2),
    LAMP(),
    Random(1),
    GeometricMedian(),
    Taylor(calibration=CALIBRATION),
    Taylor(2, CALIBRATION),
    GradientSquared(CALIBRATION),
    HessianDiagonal(CALIBRATION),
    Wanda(CALIBRATION),
    JacobianImportance(CALIBRATION),
    JacobianImportance(CALIBRATION, probes=4),
]
every_criterion = pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)


@every_criterion
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_sparsity_is_exact_and_repeatable(criterion: Any, sparsity: float) -> None:
    module = Classifier()
    twin = copy.deepcopy(module)
    masks = prune(module, sparsity, criterion=criterion)
    assert zeros(module) == round(sparsity * 256)
    assert sum(int(m.logical_not().sum()) for m in masks.values()) == round(sparsity * 256)
    again = prune(twin, sparsity, criterion=criterion)
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


@every_criterion
def test_groups_and_layers(criterion: Any) -> None:
    module = Classifier()
    masks = prune(module, 0.5, criterion=criterion, pattern=Neurons(), include="net.0.*")
    rows = masks["net.0.weight"].any(1)
    assert rows.sum() == 8
    assert torch.equal(masks["net.0.weight"], rows[:, None].expand(16, FEATURES))
    masks = prune(module, 0.75, criterion=criterion, pattern=Unstructured("layer"))
    assert [int(m.sum()) for m in masks.values()] == [48, 16]


def test_batch_norm_scale() -> None:
    masks = prune(Classifier(), 0.5, criterion=BatchNormScale(), include="net.0.*")
    assert masks["net.0.weight"].sum() == 96
    with pytest.raises(ValueError, match=r"Give `exclude = \['net.3.weight'\]`"):
        prune(Classifier(), 0.5, criterion=BatchNormScale())


def test_nothing_is_asked_for_where_there_is_nothing_to_prune() -> None:
    module = nn.Linear(10, 10)
    masks = MaskSet({"weight": module.weight})

    def evidence() -> Evidence:
        raise AssertionError("nothing is known yet")

    for sparsity in (0.0, 0.004):
        assert not advance(masks, sparsity, Taylor(), Unstructured(), evidence)
    assert masks.pruned == 0
    with pytest.raises(AssertionError, match="nothing is known yet"):
        advance(masks, 0.005, Taylor(), Unstructured(), evidence)


def test_it_says_whether_anything_changed() -> None:
    masks = MaskSet({"weight": nn.Linear(10, 10).weight})
    assert [advance(masks, s, Magnitude(), Unstructured()) for s in (0.5, 0.5, 0.2, 0.6)] == [
        True,
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\)"):
        prune(nn.Linear(2, 2), sparsity)


def test_classes_in_the_place_of_objects() -> None:
    with pytest.raises(TypeError, match=r"`criterion` must be a `Criterion`.*Did you mean `Taylor\(\)`"):
        prune(nn.Linear(2, 2), 0.5, criterion=Taylor)
