"""`ActivationCheck`: which layers vanish or explode, when, and that healthy nets hear nothing."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import CLASSES, FEATURES, Classifier, ManualClassifier, loader, sgd, trainer
from torch import nn

from lightning_structopt.blocks import MLP, ActivationCheck, ResidualBlock, Xavier


class Deep(Classifier):
    def __init__(self, scale: float = 1.0, depth: int = 6, optimizer: Any = sgd) -> None:
        super().__init__(optimizer)
        torch.manual_seed(1)
        self.net = MLP(FEATURES, (32,) * depth, CLASSES)
        with torch.no_grad():
            for layer in self.net.hidden:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(scale)


def fit(root: Path, module: Any, check: ActivationCheck, **options: Any) -> Any:
    run = trainer(root, check, **{"max_epochs": 2, **options})
    run.fit(module, loader())
    return run


def test_healthy_nets_hear_nothing_and_sizes_are_by_hand(tmp_path: Path) -> None:
    module, check = Deep(), ActivationCheck(every=100)
    inputs, _ = next(iter(loader()))
    hidden = module.net.hidden
    expected = hidden[2](hidden[1](hidden[0](inputs))).square().mean().sqrt().item()
    fit(tmp_path, module, check)
    assert check.findings == []
    assert check.activations["net.hidden.2"] == pytest.approx(expected, rel=1e-5)
    assert (
        set(check.activations)
        == set(check.gradients)
        == {*(f"net.hidden.{2 * i}" for i in range(6)), "net.head"}
    )


def test_gradients_are_those_of_the_step(tmp_path: Path) -> None:
    module, check = Deep(), ActivationCheck()
    twin = Deep()
    twin.load_state_dict(module.state_dict())
    inputs, labels = next(iter(loader()))
    nn.functional.cross_entropy(twin(inputs), labels).backward()
    fit(tmp_path, module, check, max_steps=1)
    for name, size in check.gradients.items():
        gradient = twin.get_submodule(name).weight.grad
        assert size == pytest.approx(gradient.square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("scale", "depth", "words"),
    [
        (0.01, 6, ["vanishing activations at initialization", "`net.hidden.4`", "LSUV"]),
        (30.0, 6, ["exploding activations at initialization", "`net.hidden.10`", "Add norms"]),
    ],
)
def test_bad_initialization_is_named(tmp_path: Path, scale: float, depth: int, words: list[str]) -> None:
    check = ActivationCheck()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, Deep(scale, depth), check, max_steps=1)
    text = " ".join(str(warning.message) for warning in caught)
    assert all(word in text for word in words), text
    assert any(finding.layer in words[1] for finding in check.findings)


def test_vanishing_gradients_are_those_far_below_the_largest(tmp_path: Path) -> None:
    module = Classifier()
    module.net = MLP(FEATURES, (32,) * 12, CLASSES, activation=nn.Sigmoid, initialization=Xavier())
    for layer in module.net.hidden[:2]:
        layer.requires_grad_(False)  # has no gradient, which is no finding
    check = ActivationCheck(low=1e-3)
    with pytest.warns(UserWarning, match="vanishing gradients at initialization: `net.hidden.2`"):
        fit(tmp_path, module, check, max_steps=1)
    largest = max(check.gradients.values())
    expected = {name for name, size in check.gradients.items() if size < 1e-3 * largest}
    assert {finding.layer for finding in check.findings} == expected
    assert "net.head" not in expected


def test_explodes_during_training(tmp_path: Path) -> None:
    check = ActivationCheck(every=1)
    module = Deep(optimizer=lambda p: torch.optim.SGD(p, lr=50.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, module, check)
    first = min((str(w.message) for w in caught if "exploding" in str(w.message)), key=len)
    assert "at initialization" not in first
    assert len({(f.layer, f.signal, f.trouble) for f in check.findings}) == len(check.findings)  # each once


def test_zeros_that_are_meant_pass_at_the_first_batch(tmp_path: Path) -> None:
    module = Classifier()
    body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
    module.net[2] = ResidualBlock(body, activation="relu", zero_init=True)
    check = ActivationCheck(every=100)
    fit(tmp_path, module, check)
    assert check.activations["net.2.body.3"] == 0
    assert check.gradients["net.2.body.0"] == 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_hooks_are_there_for_the_checked_batch_alone(tmp_path: Path, accumulate: int) -> None:
    module, check = Deep(), ActivationCheck(every=4)
    hooks: list[int] = []
    step = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        hooks.append(len(module.net.head._forward_hooks))
        return step(batch, batch_idx)

    module.training_step = training_step
    fit(tmp_path, module, check, accumulate_grad_batches=accumulate)
    assert hooks == [1, 0, 0, 0, 1, 0, 0, 0]
    assert check.gradients
    assert not module.net.head._forward_hooks


def test_hooks_go_after_a_crash(tmp_path: Path) -> None:
    module = Deep()
    module.training_step = lambda *args: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, ActivationCheck())
    assert not module.net.head._forward_hooks


def test_manual_optimization_and_low_precision(tmp_path: Path) -> None:
    check = ActivationCheck(every=1)
    fit(tmp_path, ManualClassifier(), check, precision="bf16-mixed")
    assert check.activations
    assert check.gradients
    assert check.findings == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ActivationCheck(every=0), "`every` must be at least 1"),
        (lambda: ActivationCheck(low=0.0), r"`low` must be in \(0, 1\)"),
        (lambda: ActivationCheck(high=0.5), r"`high` must be in \(1"),
    ],
)
def test_bad_values(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
