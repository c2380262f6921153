"""Members that predict a mean and a variance."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Regressor, numbers
from support import trainer
from torch import Tensor, nn

from lightning_structopt import ParallelEnsemble


class Uncertain(Regressor):
    """Predicts a mean and a variance, as a pair."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(hidden=8, seed=seed)
        self.spread = nn.Linear(12, 1)

    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs), nn.functional.softplus(self.spread(inputs)).squeeze(1) + 0.01


class SideBySide(nn.Module):
    """The same as one tensor."""

    def __init__(self, member: nn.Module) -> None:
        super().__init__()
        self.member = member

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack(self.member(inputs), -1)


def members(count: int = 3) -> list[nn.Module]:
    return [Uncertain(seed) for seed in range(count)]


INPUTS, TARGET = numbers().dataset.tensors


def mixture(weights: Tensor, parts: list[nn.Module]) -> tuple[Tensor, Tensor]:
    means, variances = (torch.stack(found) for found in zip(*(part(INPUTS) for part in parts), strict=True))
    mean = (weights[:, None] * means).sum(0)
    return mean, (weights[:, None] * (variances + means**2)).sum(0) - mean**2


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("wrap", [lambda member: member, SideBySide], ids=["pair", "tensor"])
def test_mean_and_variance_are_those_of_the_mixture(wrap: Any, stack: bool) -> None:
    weights = torch.tensor([0.5, 0.3, 0.2])
    expected = mixture(weights, members())
    ensemble = ParallelEnsemble([wrap(m) for m in members()], weights.tolist(), "gaussian", stack=stack)
    found = ensemble.predict_with_variance(INPUTS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ensemble(INPUTS), torch.stack(found, -1))
    # An ensemble is a member.
    tree = ParallelEnsemble([ensemble, copy.deepcopy(ensemble)], combine="gaussian")
    torch.testing.assert_close(tree(INPUTS), ensemble(INPUTS))


def test_trains_weights_and_is_scored(tmp_path: Path) -> None:
    parts = members()
    ensemble = ParallelEnsemble(parts, "learned", "gaussian", lr=0.1)
    before = trainer(tmp_path).validate(ensemble, numbers(), verbose=False)[0]
    mean, variance = mixture(torch.full((3,), 1 / 3), parts)
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(TARGET).mean()
    # torch leaves the constant of the density out.
    assert before["val_loss"] == pytest.approx(float(expected) - 0.5 * torch.log(torch.tensor(2 * torch.pi)))
    assert before["val_MSE"] == pytest.approx(float((mean - TARGET).square().mean()), rel=1e-5)
    member = float((parts[1](INPUTS)[0] - TARGET).square().mean())
    assert before["1/val_MSE"] == pytest.approx(member, rel=1e-5)
    trainer(tmp_path, max_epochs=10).fit(ensemble, numbers())
    assert trainer(tmp_path).validate(ensemble, numbers(), verbose=False)[0]["val_loss"] < before["val_loss"]
    assert torch.cat(trainer(tmp_path).predict(ensemble, numbers())).shape == (32, 2)


def test_members_are_trained_together_by_the_density(tmp_path: Path) -> None:
    ensemble = ParallelEnsemble(members(), combine="gaussian", train_members=True)

    def loss() -> float:
        return float(ensemble.loss(ensemble(INPUTS), TARGET).detach())

    before = loss()
    trainer(tmp_path, max_epochs=5).fit(ensemble, numbers())
    assert loss() < before


@pytest.mark.parametrize(
    ("member", "found"),
    [
        (nn.Linear(12, 1), r"a tensor of shape \(32, 1\)"),
        (Uncertain(), None),
        (nn.LSTM(12, 2), "a `tuple`"),
    ],
    ids=["tensor", "pair elsewhere", "other tuple"],
)
def test_wrong_members(member: nn.Module, found: str | None) -> None:
    if found is None:  # a pair where one number is wanted
        with pytest.raises(TypeError, match="A member must return a tensor"):
            ParallelEnsemble([member], combine="mean")(INPUTS)
        return
    with pytest.raises(TypeError, match=f"must return a mean and a variance.* Found {found}"):
        ParallelEnsemble([member], combine="gaussian")(INPUTS)


def test_logarithms_are_no_variances() -> None:
    ensemble = ParallelEnsemble([nn.Linear(12, 2)], combine="gaussian")
    nn.init.constant_(ensemble.members[0].bias, -100.0)
    with pytest.raises(ValueError, match="negative"):
        ensemble.loss(ensemble(INPUTS), TARGET)
