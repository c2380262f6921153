"""Fifty fits in one process leave what five left: no hook, tensor, module, trainer or optimizer more."""

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import Classifier, adamw, loader, trainer
from test_callbacks import CALLBACKS
from test_modules import MODULES
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

KINDS = (Tensor, nn.Module, pl.Trainer, pl.Callback, Optimizer, RemovableHandle)
FITS, SETTLED = 50, 5


def hooks(module: nn.Module) -> int:
    """Count what is attached to a module, its parts and its parameters."""
    attached = 0
    for part in (*module.modules(), *module.parameters()):
        tables = [name for name in dir(part) if name.endswith("hooks") and not name.startswith("__")]
        attached += sum(len(found) for name in tables if isinstance(found := getattr(part, name), dict))
    return attached


def alive() -> Counter[str]:
    """Count what the garbage collector finds of everything that a fit makes."""
    gc.collect()
    # Not by `isinstance`, which asks proxies and lazy modules what they are.
    kinds = [type(each) for each in gc.get_objects()]
    return Counter(kind.__name__ for kind in kinds if issubclass(kind, KINDS))


def assert_flat(root: Path, module: pl.LightningModule, *callbacks: pl.Callback) -> None:
    counts: list[Any] = []
    for fit in range(FITS):
        run = trainer(root, *callbacks, max_epochs=2, limit_train_batches=3)
        run.fit(module, loader())
        if fit + 1 in {SETTLED, FITS}:
            del run
            counts.append((hooks(module), alive()))
    (hooks_before, before), (hooks_after, after) = counts
    assert hooks_after == hooks_before
    assert {kind: after[kind] - before[kind] for kind in after if after[kind] > before[kind]} == {}


@pytest.mark.parametrize("name", CALLBACKS)
def test_callbacks_leave_nothing(name: str, tmp_path: Path) -> None:
    module = Classifier(adamw)
    before = hooks(module)
    assert_flat(tmp_path, module, CALLBACKS[name]())
    assert hooks(module) == before


@pytest.mark.parametrize(
    "name", ["DistillationModule, features", "MutualDistillation", "ParallelEnsemble, together"]
)
def test_modules_leave_nothing(name: str, tmp_path: Path) -> None:
    assert_flat(tmp_path, MODULES[name]())


def test_what_is_left_is_seen(tmp_path: Path) -> None:
    class Leaks(pl.Callback):
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.kept.append(torch.ones(1))

    with pytest.raises(AssertionError, match="Tensor"):
        assert_flat(tmp_path, Classifier(), Leaks())
