"""Chains: members add up, are trained in turn as by hand, and resume."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nets import Regressor, fit, numbers
from support import Classifier, adamw, assert_same_state, dataset, loader, trainer
from torch import nn

from lightning_structopt.ensembles import SerialEnsemble
from lightning_structopt.ensembles.serial.chain import chain

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def test_outputs_add_up() -> None:
    members = [Regressor(seed=seed) for seed in range(3)]
    inputs = numbers().dataset.tensors[0]
    values = [member(inputs) for member in members]
    found = SerialEnsemble(members, "chain", task="regression", shrinkage=0.5)(inputs)
    torch.testing.assert_close(found, values[0] + 0.5 * values[1] + 0.5 * values[2])
    members = [Classifier(seed=seed).eval() for seed in range(2)]
    inputs = dataset().tensors[0]
    found = SerialEnsemble(members, "chain")(inputs)
    torch.testing.assert_close(found, (members[0](inputs) + members[1](inputs)).log_softmax(1))


def test_gradients_reach_the_member_in_turn_alone() -> None:
    members = [nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1)]
    chain(members[:2], torch.ones(4, 2), 0.5, pass_on=False, trained=1)[-1].sum().backward()
    assert members[0].weight.grad is None
    assert torch.equal(members[1].weight.grad, torch.full((1, 2), 2.0))


def stumps() -> list[Regressor]:
    return [Regressor(hidden=2, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("shrinkage", [1.0, 0.5])
def test_members_are_trained_in_turn_on_residuals(shrinkage: float, tmp_path: Path) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)

    ensemble = SerialEnsemble(stumps(), "chain", task="regression", shrinkage=shrinkage, optimizer=sgd)
    fit(tmp_path, ensemble, data=numbers(), max_epochs=9)
    by_hand, before = stumps(), []
    for index, member in enumerate(by_hand):
        optimizer, factor = sgd(member.parameters()), 1.0 if index == 0 else shrinkage
        for _ in range(3):
            for inputs, target in numbers():
                residual = target - sum(f * m(inputs).detach() for f, m in before)
                optimizer.zero_grad()
                (factor * member(inputs) - residual).square().mean().backward()
                optimizer.step()
        before.append((factor, member))
    for found, expected in zip(ensemble.members, by_hand, strict=True):
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-5)


def test_each_member_helps(tmp_path: Path) -> None:
    ensemble = SerialEnsemble(stumps(), "chain", task="regression", lr=0.03)
    fit(tmp_path, ensemble, data=numbers(128, 16), max_epochs=45)
    found = trainer(tmp_path).validate(ensemble, numbers(128, 16), verbose=False)[0]
    assert found["2/val_MSE"] < found["1/val_MSE"] < found["0/val_MSE"]
    assert found["val_MSE"] == found["2/val_MSE"]


def test_classes_are_boosted_and_norms_of_members_done_stay(tmp_path: Path) -> None:
    seen: list[tuple[int, list[bool]]] = []

    class Watched(SerialEnsemble):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((self.in_use, [member.training for member in self.members]))
            return super().training_step(batch, batch_idx)

    ensemble = Watched([Classifier(hidden=3, seed=seed) for seed in range(3)], "chain")
    states: list[Any] = []
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, ensemble, saved, max_epochs=6)
    for epoch in range(6):
        checkpoint = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        states.append(checkpoint["state_dict"])
    first = [{k: v for k, v in state.items() if k.startswith("members.0.")} for state in states]
    assert_same_state(first[1], first[5])
    with pytest.raises(AssertionError):
        assert_same_state(first[0], first[1])
    assert [in_use for in_use, _ in seen[::4]] == [1, 1, 2, 2, 3, 3]
    assert all(modes == [index == in_use - 1 for index in range(3)] for in_use, modes in seen)


def chained() -> SerialEnsemble:
    return SerialEnsemble([Classifier(hidden=4, seed=seed) for seed in range(2)], "chain", optimizer=adamw)


def test_resume_equals_straight(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = fit(tmp_path, chained(), saved)
    for epoch in range(3):
        resumed = fit(tmp_path, chained(), ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
    halfway = chained()
    halfway.load_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])
    inputs = dataset().tensors[0]
    halfway.eval()
    torch.testing.assert_close(halfway(inputs), halfway.members[0](inputs).log_softmax(1))


@pytest.mark.parametrize("named", [False, True])
def test_what_came_before_is_passed_on(named: bool) -> None:
    class After(nn.Module):
        def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
            return 10 * before + x

    class First(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    ensemble = SerialEnsemble([First(), After(), After()], "chain", task="regression", pass_on=True)
    found = ensemble(x=torch.ones(1)) if named else ensemble(torch.ones(1))
    assert float(found) == 2 + 21 + 231


def test_wrong_chains(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Found 1 steps for 2 members. Limit the trainer"):
        fit(tmp_path, chained(), max_steps=1)
    with pytest.raises(ValueError, match=r"`shrinkage` must be in \(0, 1\]"):
        SerialEnsemble([nn.Linear(1, 1)], "chain", shrinkage=0.0)
    with pytest.raises(
        ValueError, match=r"one shape. Found \(32, 4\) of those before member 1, and \(32, 5\) of that"
    ):
        SerialEnsemble([nn.Linear(12, 4), nn.Linear(12, 5)], "chain")(dataset().tensors[0])
    with pytest.raises(ValueError, match="`route` is for cascades"):
        chained().route(dataset().tensors[0])


def test_a_fast_run_and_two_fits(tmp_path: Path) -> None:
    ensemble = chained()
    fit(tmp_path, ensemble, fast_dev_run=True)
    assert ensemble.in_use == 2
    before = copy.deepcopy(ensemble.members[0].state_dict())
    fit(tmp_path, ensemble, max_epochs=2, precision="bf16-mixed", accumulate_grad_batches=2)
    with pytest.raises(AssertionError):
        assert_same_state(ensemble.members[0].state_dict(), before)
    assert len(trainer(tmp_path).predict(ensemble, loader())) == 4
