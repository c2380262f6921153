"""What the configurations beside this file name: handwritten digits, and a network for them."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `data` is

from data import load  # noqa: E402

import lightning_structopt as so  # noqa: E402


class Digits(pl.LightningDataModule):
    """Scikit-learn's digits, or Fashion-MNIST where it is found; a sixth of the training images is for validation."""

    def __init__(self, name: str = "digits", batch_size: int = 64) -> None:
        super().__init__()
        train_x, train_y, test_x, test_y = load(name)
        held_out = len(train_x) // 6
        self.batch_size = batch_size
        self.train = TensorDataset(train_x[held_out:], train_y[held_out:])
        self.validation = TensorDataset(train_x[:held_out], train_y[:held_out])
        self.test = TensorDataset(test_x, test_y)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.validation, 256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 256)


class Classifier(pl.LightningModule):
    """A convolutional network, written as any user would."""

    def __init__(self, width: int = 32, size: int = 8, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.example_input_array = torch.zeros(1, 1, size, size)
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", multiclass_accuracy(self(images), labels, 10, average="micro"), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("test_acc", multiclass_accuracy(self(images), labels, 10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class GatedClassifier(Classifier):
    """Three residual blocks with a gate each, and one line for what gates add to the loss."""

    def __init__(self, width: int = 16, budget: float = 0.5) -> None:
        super().__init__(width)
        self.save_hyperparameters()
        self.budget = so.GateBudget(budget)
        blocks = [so.GatedBlock(self._body(width), so.Gate(width), activation="relu") for _ in range(3)]
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), *blocks,
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10),
        )  # fmt: skip

    @staticmethod
    def _body(width: int) -> nn.Module:
        convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(width))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + so.auxiliary_loss(self, self.budget)
