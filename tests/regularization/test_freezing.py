"""Penalty and pruning on one module: zeros never come back, and pruning takes those of the penalty over."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, sgd, trainer, zeros

from lightning_structopt.pruning import IterativePruning
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.regularization import L1, L2, GroupLasso, SparsityPenalty

WEIGHTS = 256


class Watch(pl.Callback):
    """Asserts after every batch that what a mask prunes is zero; notes what was zero at the end of each epoch."""

    def __init__(self, pruning: IterativePruning) -> None:
        self.pruning = pruning
        self.dead: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.pruning.masks.items():
            assert not parameters[name][~mask].any(), f"{name} was revived"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.dead.append({n: p == 0 for n, p in pl_module.named_parameters() if p.ndim > 1})


def quiet(sparsity: float = 0.5, **kwargs: Any) -> IterativePruning:
    return IterativePruning(sparsity, **{"begin": 0.2, "end": 0.6, "verbose": False, **kwargs})


def fit(root: Path, module: Any, pruning: IterativePruning, *more: Any, **kwargs: Any) -> Watch:
    watch = Watch(pruning)
    trainer(root, *more, watch, **{"max_epochs": 6, **kwargs}).fit(module, loader())
    return watch


@pytest.mark.parametrize("order", [1, -1], ids=["penalty first", "pruning first"])
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("penalty", [L1(0.02), L2(0.1), GroupLasso(0.02)], ids=repr)
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_penalty_does_not_revive_what_is_pruned(
    tmp_path: Path, optimizer: Any, penalty: Any, mode: Any, order: int
) -> None:
    module, pruning = Classifier(optimizer), quiet(0.8, interval="step")
    fit(tmp_path, module, pruning, *[SparsityPenalty(penalty, mode), pruning][::order])
    assert pruning.sparsity == round(0.8 * WEIGHTS) / WEIGHTS
    assert zeros(module) >= round(0.8 * WEIGHTS)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mode", ["proximal", "gradient"])
@pytest.mark.parametrize("penalty", [L1(0.02), GroupLasso(0.02), GroupLasso(0.02, "channel")], ids=repr)
def test_the_order_of_the_callbacks_does_not_matter(
    tmp_path: Path, penalty: Any, mode: Any, clip: float | None
) -> None:
    one, other = Classifier(), Classifier()
    for module, order in ((one, 1), (other, -1)):
        pruning = quiet(0.5, interval="step")
        fit(
            tmp_path,
            module,
            pruning,
            *[SparsityPenalty(penalty, mode), pruning][::order],
            gradient_clip_val=clip,
        )
    assert_same_state(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("order", [1, -1], ids=["penalty first", "pruning first"])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(
    ("penalty", "optimizer"),
    [(L1(0.02), sgd), (L1(0.1), adamw), (GroupLasso(0.1, "channel"), adamw)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_zeros_at_the_end_of_an_epoch_stay(
    tmp_path: Path, penalty: Any, optimizer: Any, interval: Any, order: int
) -> None:
    module, pruning = Classifier(optimizer), quiet(0.2, interval=interval)
    callbacks = [SparsityPenalty(penalty, freeze_zeros=True), pruning][::order]
    watch = fit(tmp_path, module, pruning, *callbacks)
    for earlier, later in zip(watch.dead, watch.dead[1:], strict=False):
        assert all(later[name][dead].all() for name, dead in earlier.items())
    for name, mask in pruning.masks.items():
        assert torch.equal(~mask, watch.dead[-1][name])
    assert pruning.sparsity == zeros(module) / WEIGHTS > 0.3


def test_without_freezing_some_come_back(tmp_path: Path) -> None:
    """So that the test above means something."""
    module, pruning = Classifier(sgd), quiet(0.2)
    watch = fit(tmp_path, module, pruning, SparsityPenalty(L1(0.02)), pruning)
    pairs = list(zip(watch.dead, watch.dead[1:], strict=False))
    assert any((dead & ~later[name]).any() for earlier, later in pairs for name, dead in earlier.items())


def test_optimizers_forget_frozen_zeros(tmp_path: Path) -> None:
    module, pruning = Classifier(adamw), quiet(0.1)
    run = trainer(tmp_path, SparsityPenalty(L1(0.1), freeze_zeros=True), pruning)
    run.fit(module, loader())
    for name, mask in pruning.masks.items():
        state = run.optimizers[0].state[dict(module.named_parameters())[name]]
        assert (state["exp_avg_sq"][~mask] == 1).all()
        assert (state["exp_avg_sq"][mask] < 1).all()


def test_averages_are_frozen_too(tmp_path: Path) -> None:
    module, pruning = Classifier(), quiet(0.1)
    ema = EMAWeightAveraging(decay=0.9)
    fit(tmp_path, module, pruning, SparsityPenalty(L1(0.02), freeze_zeros=True), pruning, ema)
    assert zeros(module) == pruning.sparsity * WEIGHTS > 50


def test_two_prunings_divide_the_zeros(tmp_path: Path) -> None:
    module = Classifier()
    body, head = quiet(0.1, include="net.0.*"), quiet(0.1, exclude="net.0.*")
    fit(tmp_path, module, body, SparsityPenalty(L1(0.03), freeze_zeros=True), body, head)
    assert body.sparsity == zeros(module, ["net.0.weight"]) / 192 > 0.2
    assert head.sparsity == zeros(module, ["net.3.weight"]) / 64 > 0.2


def test_only_penalized_parameters_are_frozen(tmp_path: Path) -> None:
    module, pruning = Classifier(), quiet(0.0)
    fit(tmp_path, module, pruning, SparsityPenalty(L1(0.05), include="net.0.*", freeze_zeros=True), pruning)
    assert not pruning.masks["net.0.weight"].all()
    assert pruning.masks["net.3.weight"].all()


@pytest.mark.parametrize(
    "kwargs", [{"limit_train_batches": 3}, {"fast_dev_run": True}, {"max_epochs": 1}], ids=str
)
def test_short_epochs_end_too(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    module, pruning = Classifier(), quiet(0.0, begin=0.0, end=1.0)
    fit(tmp_path, module, pruning, SparsityPenalty(L1(0.3), freeze_zeros=True), pruning, **kwargs)
    assert pruning.sparsity * WEIGHTS == zeros(module) > 0


def test_manual_optimization(tmp_path: Path) -> None:
    module, pruning = ManualClassifier(optimizer=adamw), quiet(0.2)
    fit(tmp_path, module, pruning, SparsityPenalty(L1(0.1), freeze_zeros=True), pruning)
    assert pruning.sparsity == zeros(module) / WEIGHTS > 0.3


def test_masks_take_zeros_over() -> None:
    layers = torch.nn.ModuleDict({name: torch.nn.Linear(3, 2, bias=False) for name in "ab"})
    parameters = {name: layer.weight for name, layer in layers.items()}
    masks = MaskSet(parameters)
    assert not masks.prune_zeros(parameters)
    for weight in parameters.values():
        weight.data[0, 1] = -0.0
    assert masks.prune_zeros(["a", "elsewhere"])
    assert masks.pruned == 1
    assert not masks.prune_zeros(["a"])
    assert masks.prune_zeros(["b"])
    assert [mask.flatten().tolist().index(False) for mask in masks.masks().values()] == [1, 1]
