"""Training with a penalty ends where theory and scikit-learn say the minimum is."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from least_squares import Regression, orthonormal, solve
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet, Lasso, Ridge
from torch import Tensor

from lightning_structopt.lr_decay import LRDecay
from lightning_structopt.regularization import L1, L2, GroupLasso, SparsityPenalty
from lightning_structopt.schedules import Cosine

OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.2),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, dampening=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.02),
}
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
STRENGTH = 0.1


def soft_threshold(weight: Tensor, dim: int | None) -> Tensor:
    """Return the closed form of the lasso, or of the group lasso whose groups extend over ``dim``."""
    if dim is None:
        return weight.sign() * (weight.abs() - STRENGTH).clamp_min(0)
    threshold = STRENGTH * math.sqrt(weight.shape[dim])
    return weight * (1 - threshold / weight.norm(dim=dim, keepdim=True)).clamp_min(0)


CLOSED_FORMS: dict[str, Any] = {
    "L1": (L1(STRENGTH), lambda w: soft_threshold(w, None)),
    "L2": (L2(STRENGTH), lambda w: w / (1 + STRENGTH)),
    "neurons": (GroupLasso(STRENGTH), lambda w: soft_threshold(w, 1)),
    "channels": (GroupLasso(STRENGTH, "channel"), lambda w: soft_threshold(w, 0)),
}


@pytest.mark.parametrize("optimizer", ["SGD", "momentum", "Adam"])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_orthonormal_design(tmp_path: Path, name: str, optimizer: str) -> None:
    inputs, targets, least_squares = orthonormal()
    penalty, closed_form = CLOSED_FORMS[name]
    expected = closed_form(least_squares)
    assert name == "L2" or 0 < int((expected == 0).sum()) < expected.numel()
    module = Regression(inputs, targets, OPTIMIZERS[optimizer])
    weight = solve(tmp_path, module, SparsityPenalty(penalty), steps=600)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-5)
    assert torch.equal(weight == 0, expected == 0)


def diabetes() -> tuple[Tensor, Tensor]:
    inputs, targets = load_diabetes(return_X_y=True)
    inputs = inputs / inputs.std(0)  # else one rate would not suit weights and bias
    return torch.tensor(inputs), torch.tensor(targets / targets.std())[:, None]


@every_optimizer
def test_lasso_on_diabetes(tmp_path: Path, optimizer: Any) -> None:
    inputs, targets = diabetes()
    expected = Lasso(alpha=0.05, tol=1e-10, max_iter=10_000).fit(inputs.numpy(), targets.numpy())
    module = Regression(inputs, targets, optimizer, bias=True)
    callbacks = SparsityPenalty(L1(0.05)), LRDecay(Cosine(minimum=0.1))
    weight = solve(tmp_path, module, *callbacks, steps=1500)[0]
    assert weight.numpy() == pytest.approx(expected.coef_, abs=1e-4)
    assert module.net.bias.item() == pytest.approx(expected.intercept_[0], abs=1e-3)
    assert torch.equal(weight == 0, torch.tensor(expected.coef_ == 0))
    assert 3 < int((weight == 0).sum()) < 8


@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("optimizer", ["momentum", "Adam"])
def test_ridge_on_diabetes(tmp_path: Path, optimizer: str, mode: Any) -> None:
    inputs, targets = diabetes()
    expected = Ridge(alpha=0.3 * len(inputs)).fit(inputs.numpy(), targets.numpy()[:, 0])
    module = Regression(inputs, targets, OPTIMIZERS[optimizer], bias=True)
    callbacks = SparsityPenalty(L2(0.3), mode), LRDecay(Cosine(minimum=0.1))
    weight = solve(tmp_path, module, *callbacks, steps=1500)[0]
    assert weight.numpy() == pytest.approx(expected.coef_, abs=1e-4)


def test_l1_and_weight_decay_are_the_elastic_net(tmp_path: Path) -> None:
    inputs, targets = diabetes()
    targets = targets - targets.mean()
    net = ElasticNet(alpha=0.3, l1_ratio=0.5, tol=1e-10).fit(inputs.numpy(), targets.numpy())
    module = Regression(
        inputs, targets, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.15), bias=False
    )
    weight = solve(tmp_path, module, SparsityPenalty(L1(0.15)), steps=500)[0]
    assert weight.numpy() == pytest.approx(net.coef_, abs=1e-5)
    assert torch.equal(weight == 0, torch.tensor(net.coef_ == 0))


def test_lasso_by_gradients_comes_near_but_not_to_zero(tmp_path: Path) -> None:
    inputs, targets, least_squares = orthonormal()
    expected = soft_threshold(least_squares, None)
    module = Regression(inputs, targets, lambda p: torch.optim.SGD(p, lr=0.01))
    weight = solve(tmp_path, module, SparsityPenalty(L1(STRENGTH), "gradient"), steps=1000)
    torch.testing.assert_close(weight, expected, rtol=0, atol=2 * 0.01 * STRENGTH)
    assert not (weight == 0).any()
