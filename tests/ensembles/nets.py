"""Models that the tests of ensembles share."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from support import CLASSES, FEATURES, Classifier, adamw, loader, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(pl.LightningModule):
    """A straight line, or with `hidden` a perceptron."""

    def __init__(self, hidden: int = 0, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        body = [nn.Linear(FEATURES, hidden), nn.Tanh()] if hidden else []
        self.net = nn.Sequential(*body, nn.Linear(hidden or FEATURES, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Answers(nn.Module):
    """Returns for the number that is each input's first feature the row of a table; counts the rows it sees."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.register_buffer("table", torch.as_tensor(table, dtype=torch.float32))
        self.seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return self.table[inputs[:, 0].long()]


def rows(count: int, batch_size: int, target: Tensor) -> DataLoader:
    """Batches of the numbers of rows, for `Answers`."""
    return DataLoader(TensorDataset(torch.arange(count).float().unsqueeze(1), target), batch_size)


def numbers(samples: int = 32, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, FEATURES, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, 0] * 2 + inputs[:, 1].sin()), batch_size)


def classifiers(count: int = 3, hidden: int = 16) -> list[pl.LightningModule]:
    """Members whose running statistics are those of some data."""
    members = [Classifier(adamw, hidden=hidden, seed=index) for index in range(count)]
    for member in members:
        for inputs, _ in loader():
            member(inputs)
    return [member.eval() for member in members]


def fit(root: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    data, ckpt = kwargs.pop("data", None) or loader(), kwargs.pop("ckpt", None)
    run = trainer(root, *callbacks, **kwargs)
    run.fit(module, data, data, ckpt_path=ckpt)
    return run


def logits(samples: int, seed: int = 0, classes: int = CLASSES) -> Tensor:
    return torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed))
