"""What `SparsityPenalty` refuses, before the first step, and what it says."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from support import Classifier, dataset, loader, trainer

from lightning_structopt.pruning import IterativePruning
from lightning_structopt.regularization import L1, L2, GroupLasso, SparsityPenalty
from lightning_structopt.schedules import Constant, Linear, Warmup


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"penalty": 1e-5}, TypeError, "`penalty` must be a `Penalty`. Found `penalty = 1e-05`"),
        ({"penalty": L1}, TypeError, r"Did you mean `L1\(\)`"),
        ({"mode": "prox"}, ValueError, "`mode` must be 'proximal' or 'gradient'. Found `mode = 'prox'`"),
        ({"schedule": Linear}, TypeError, "`schedule` must be a `Schedule`"),
        ({"freeze_zeros": 1}, TypeError, "`freeze_zeros` must be a `bool`. Found `freeze_zeros = 1`"),
        ({"include": 3}, TypeError, "`include` takes globs on parameter names and module types. Found 3"),
        (
            {"freeze_zeros": True, "mode": "gradient"},
            ValueError,
            "needs a penalty that brings weights to zero",
        ),
        ({"freeze_zeros": True, "penalty": L2(0.1)}, ValueError, r"Found `L2\(strength=0.1\)` with"),
    ],
)
def test_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparsityPenalty(**{"penalty": L1(0.1), **arguments})


def assert_refused(
    root: Path, message: str, *callbacks: pl.Callback, module: Any = None, **kwargs: Any
) -> None:
    def never(batch: Any, batch_idx: int) -> None:
        pytest.fail("a step was taken")

    module = Classifier() if module is None else module
    module.training_step = never
    data = kwargs.pop("data", loader())
    with pytest.raises(ValueError, match=message):
        trainer(root, *callbacks, **kwargs).fit(module, data)


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    assert_refused(tmp_path, "No parameter matches", SparsityPenalty(L1(0.1), include="head.*"))


def test_two_owners(tmp_path: Path) -> None:
    callbacks = SparsityPenalty(L1(0.1)), SparsityPenalty(GroupLasso(0.1), include="net.3.*")
    message = "one `SparsityPenalty`. Found two that own `net.3.weight`. Divide .* `weight_decay`"
    assert_refused(tmp_path, message, *callbacks)


def lbfgs(**kwargs: Any) -> Any:
    return lambda parameters: torch.optim.LBFGS(parameters, **kwargs)


def test_lbfgs(tmp_path: Path) -> None:
    assert_refused(tmp_path, "Found `LBFGS`", SparsityPenalty(L1(0.1)), module=Classifier(lbfgs()))
    searching = Classifier(lbfgs(line_search_fn="strong_wolfe"))
    gradient = SparsityPenalty(L1(0.1), "gradient")
    assert_refused(tmp_path, "Leave out `line_search_fn`", gradient, module=searching)


def test_lbfgs_without_a_line_search_can_take_gradients(tmp_path: Path) -> None:
    class Penalized(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + 0.5 * self.net[0].weight.square().sum()

    make = lbfgs(lr=0.1, max_iter=3, tolerance_change=0.0)
    expected, module = Penalized(make), Classifier(make)
    trainer(tmp_path).fit(expected, loader())
    trainer(tmp_path, SparsityPenalty(L2(1.0), "gradient", include="net.0.*")).fit(module, loader())
    torch.testing.assert_close(module.net.state_dict(), expected.net.state_dict())


def test_no_optimizer(tmp_path: Path) -> None:
    module = Classifier()
    module.configure_optimizers = lambda: None
    with pytest.warns(UserWarning, match="returned `None`"):
        assert_refused(
            tmp_path, "needs optimizers with learning rates", SparsityPenalty(L1(0.1)), module=module
        )


def test_a_fused_optimizer_with_a_scaler(tmp_path: Path) -> None:
    module = Classifier(lambda parameters: torch.optim.AdamW(parameters, fused=True))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    message = r"Found a fused `AdamW` with a gradient scaler.*Give the optimizer `fused=False`"
    assert_refused(tmp_path, message, SparsityPenalty(L1(0.1), "gradient"), module=module, plugins=plugin)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(dataset())


def test_a_schedule_without_an_end(tmp_path: Path) -> None:
    penalty = SparsityPenalty(L1(0.1), schedule=Linear())
    message = r"`Linear\(end=0.0\)` needs to know how many steps training takes"
    data = torch.utils.data.DataLoader(Endless(), batch_size=8)
    assert_refused(tmp_path, message, penalty, data=data)
    assert_refused(tmp_path, message, penalty, max_epochs=-1)
    for schedule in (Constant(), Warmup(3, then=Constant()), None):
        trainer(tmp_path, SparsityPenalty(L1(0.1), schedule=schedule)).fit(Classifier(), data)


@pytest.mark.parametrize("callbacks", [[], [IterativePruning(0.5, include="net.0.*", verbose=False)]])
def test_zeros_that_nobody_takes_over(tmp_path: Path, callbacks: list[pl.Callback]) -> None:
    message = f"Found none that owns `net.{3 if callbacks else 0}.weight`. Add one, or"
    assert_refused(tmp_path, message, SparsityPenalty(L1(0.1), freeze_zeros=True), *callbacks)


def test_strategies_with_parameters_of_their_own(tmp_path: Path, monkeypatch: Any) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    strategy = type("FSDPStrategy", (SingleDeviceStrategy,), {})(device="cpu")
    assert_refused(tmp_path, "Found `FSDPStrategy`", SparsityPenalty(L1(0.1)), strategy=strategy)


def test_the_other_package(tmp_path: Path) -> None:
    run = pytorch_lightning.Trainer.__new__(pytorch_lightning.Trainer)
    with pytest.raises(TypeError, match="`SparsityPenalty` is built on the package `lightning`"):
        SparsityPenalty(L1(0.1)).setup(run, Classifier(), "fit")


def test_an_optimizer_of_unknown_scale_is_a_warning(tmp_path: Path) -> None:
    module = Classifier(lambda parameters: torch.optim.Rprop(parameters, lr=0.01))
    with pytest.warns(UserWarning, match="How `Rprop` scales gradients is not known"):
        trainer(tmp_path, SparsityPenalty(L1(0.5))).fit(module, loader())
    assert (module.net[0].weight == 0).any()
