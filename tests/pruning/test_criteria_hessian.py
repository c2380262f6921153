"""The Hessian's diagonal against closed forms and autograd's full Hessian."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_structopt.pruning import prune
from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.criteria import Evidence
from lightning_structopt.pruning.curvature import HessianDiagonal


class Quadratic(nn.Module):
    """Loss and weights with a known Hessian: ``w' A w / 2``."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.weight = nn.Parameter(torch.randn(2, len(matrix) // 2))

    def forward(self, batch: Tensor) -> Tensor:
        flat = self.weight.flatten()
        return flat @ self.matrix @ flat / 2 * batch.mean()


def scores(criterion: HessianDiagonal, module: nn.Module) -> dict[str, Tensor]:
    weights = {name: p.detach() for name, p in module.named_parameters() if p.ndim > 1}
    return dict(criterion.score(weights, Evidence(module)).values)


def run(module: nn.Module, batch: Any) -> Tensor:
    return module(batch)


def test_one_probe_is_exact_where_the_hessian_is_diagonal() -> None:
    curvature = torch.tensor([3.0, 0.5, -2.0, 0.0])
    module = Quadratic(curvature.diag())
    batches = [torch.tensor([1.0]), torch.tensor([2.0, 4.0])]  # their mean scales the curvature by 2
    score = scores(HessianDiagonal(Calibration(batches, run), probes=1), module)["weight"]
    expected = module.weight.detach() ** 2 * 2 * curvature.view(2, 2) / 2
    torch.testing.assert_close(score, expected)


def test_probes_come_near_the_diagonal_of_any_hessian() -> None:
    torch.manual_seed(2)
    root = torch.randn(6, 6)
    matrix = root @ root.T
    module = Quadratic(matrix)
    calibration = Calibration(torch.ones(1), run)
    exact = module.weight.detach() ** 2 * matrix.diag().view(2, 3) / 2

    def error(probes: int) -> Tensor:
        return scores(HessianDiagonal(calibration, probes=probes), module)["weight"] - exact

    deviation = (matrix**2).sum(1).sub(matrix.diag() ** 2).sqrt().view(2, 3)  # of one probe
    limit = module.weight.detach() ** 2 / 2 * deviation
    assert (error(1500).abs() < 4 * limit / 1500**0.5).all()
    assert error(1500).norm() < error(10).norm() / 4


def test_it_is_the_diagonal_of_autograds_hessian_of_a_network() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    inputs, labels = torch.randn(6, 3).double(), torch.randint(2, (6,))
    names = ["0.weight", "2.weight"]
    sizes = [6, 4]

    def loss(flat: Tensor) -> Tensor:
        first, second = flat.split(sizes)
        chosen = {"0.weight": first.view(2, 3), "2.weight": second.view(2, 2)}
        return nn.functional.cross_entropy(torch.func.functional_call(module, chosen, inputs), labels)

    flat = torch.cat([module.get_parameter(name).detach().flatten() for name in names])
    hessian = torch.autograd.functional.hessian(loss, flat)
    expected = flat**2 * hessian.diag() / 2
    found = scores(HessianDiagonal(Calibration([(inputs, labels)]), probes=1500), module)
    spread = flat**2 / 2 * (hessian**2).sum(1).sub(hessian.diag() ** 2).clamp(min=0).sqrt()
    difference = torch.cat([found[name].flatten() for name in names]) - expected
    assert (difference.abs() < 4 * spread / 1500**0.5 + 1e-12).all()


def test_it_predicts_what_cutting_a_weight_costs_at_a_minimum() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 1, bias=False).double()
    inputs = torch.randn(50, 3).double()
    targets = inputs @ torch.tensor([[1.0, -0.5, 2.0]]).double().T
    with torch.no_grad():
        module.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.T)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(module(batch[0]), batch[1])

    score = scores(HessianDiagonal(Calibration([(inputs, targets)], loss), probes=4000), module)["weight"]
    for index in range(3):
        cut = copy.deepcopy(module)
        cut.weight.data[0, index] = 0
        assert score[0, index].item() == pytest.approx(loss(cut, (inputs, targets)).item(), rel=0.05)


def test_a_loss_that_is_linear_in_the_weights_has_none() -> None:
    module = nn.Linear(3, 2)
    calibration = Calibration(torch.randn(4, 3), lambda m, batch: m(batch).sum())
    assert scores(HessianDiagonal(calibration), module)["weight"].abs().sum() == 0


def test_the_same_seed_gives_the_same_scores() -> None:
    module = Quadratic(torch.randn(6, 6))
    first, second, other = (
        scores(HessianDiagonal(Calibration(torch.ones(1), run), probes=2, seed=seed), module)["weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HessianDiagonal(probes=0), ValueError, "`probes` must be at least 1. Found `probes = 0`"),
        (lambda: HessianDiagonal(seed=-1), ValueError, "`seed` must be at least 0"),
        (lambda: HessianDiagonal(7), TypeError, "`calibration` must be a `Calibration`"),
        (
            lambda: prune(nn.Linear(2, 2), 0.5, criterion=HessianDiagonal()),
            ValueError,
            r"Found no `calibration`. Give `HessianDiagonal\(calibration=Calibration\(batches\)\)`",
        ),
        (
            lambda: HessianDiagonal().require(nn.Linear(2, 2), {}),
            ValueError,
            "`HessianDiagonal` runs the module on data. Found no `calibration`",
        ),
    ],
)
def test_bad_arguments(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
