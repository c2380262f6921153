"""Optimizers that a module steps past Lightning's hooks: pruning hears of their steps all the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ManualClassifier, adamw, assert_same_state, loader, sgd, trainer
from torch import nn

from lightning_structopt.pruning import GradientSquared, IterativePruning, Movement, Random, RigL, Taylor
from lightning_structopt.pruning.raw_steps import RawSteps


class Closures(ManualClassifier):
    """Gives the optimizers closures that compute the gradients."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=not self.raw):

            def closure(optimizer: Any = optimizer) -> Any:
                optimizer.zero_grad()
                loss = super(ManualClassifier, self).training_step(batch, batch_idx)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure) if batch_idx % 2 else optimizer.step(closure)


def test_every_step_is_heard_of_once() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    heard: list[Any] = []
    steps = RawSteps(heard.append)
    steps.attach([optimizer])
    steps.attach([optimizer])  # again, as for a second fit
    for announced in (True, False):
        for closure in (None, lambda: layer(torch.ones(2)).sum()):
            heard.clear()
            if announced:
                steps.announce(optimizer)
            optimizer.step(closure)
            assert len(heard) == (not announced)
    heard.clear()
    steps.detach()
    optimizer.step()
    assert not heard


CALLBACKS = {
    **{
        type(criterion).__name__: lambda criterion=criterion: IterativePruning(
            0.8, criterion, interval="step", verbose=False
        )
        for criterion in (Taylor(), GradientSquared(), Movement())
    },
    "RigL": lambda: IterativePruning(0.8, Random(seed=0), regrow=RigL(every=3), verbose=False),
}


@pytest.mark.parametrize("kind", [ManualClassifier, Closures], ids=["plain", "closures"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("name", CALLBACKS)
def test_raw_optimizers_are_pruned_as_lightnings_are(
    tmp_path: Path, name: str, optimizer: Any, kind: Any
) -> None:
    ends = []
    for raw in (False, True):
        pruning, module = CALLBACKS[name](), kind(raw=raw, optimizer=optimizer)
        run = trainer(tmp_path, pruning)
        run.fit(module, loader())
        assert sum(int((~mask).sum()) for mask in pruning.masks.values()) == round(0.8 * 256)
        assert not any(o._optimizer_step_pre_hooks for o in run.optimizers)
        ends.append({"module": module.state_dict(), "masks": pruning.masks})
    assert_same_state(*ends)
