"""Linear regression in a Trainer: problems with an answer that others know."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from support import trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Regression(pl.LightningModule):
    """Half the mean squared error of a linear model, over all the data at every step."""

    def __init__(self, inputs: Tensor, targets: Tensor, optimizer: Any, bias: bool = False) -> None:
        super().__init__()
        self.inputs, self.targets, self.optimizer = inputs, targets, optimizer
        self.net = nn.Linear(inputs.shape[1], targets.shape[1], bias=bias, dtype=inputs.dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net(self.inputs) - self.targets).square().sum(1).mean() / 2

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def solve(root: Path, module: pl.LightningModule, *callbacks: pl.Callback, steps: int = 300) -> Tensor:
    """Fit ``module`` for so many steps and return its weight."""
    run = trainer(root, *callbacks, max_epochs=1, enable_model_summary=False)
    run.fit(module, DataLoader(range(steps), batch_size=1))
    return module.net.weight.detach()


def orthonormal() -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs with X'X / n = 1, targets, and the least-squares weight, some rows and columns of it small."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.linalg.qr(torch.randn(40, 5, generator=generator, dtype=torch.float64))[0] * 40**0.5
    weight = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    weight *= torch.tensor([1.0, 0.05, 1.0, 0.1, 1.0, 0.5])[:, None] * torch.tensor([
        1.0,
        0.05,
        1.0,
        0.1,
        1.0,
    ])
    return inputs, inputs @ weight.T, weight
