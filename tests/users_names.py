"""What README's code leaves to the reader: small modules, little data, and the files that it speaks of."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_structopt as so

CLASSES, SIDE = 4, 8


def dataset(samples: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(samples, 3, SIDE, SIDE, generator=generator)
    return TensorDataset(images, images.flatten(1)[:, :CLASSES].argmax(1))


def loader(samples: int = 32) -> DataLoader:
    return DataLoader(dataset(samples), batch_size=8)


class Net(pl.LightningModule):
    """A classifier of images, as any reader may have one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer1 = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.layer2 = nn.Conv2d(width, width, 3, padding=1)
        self.stage1 = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1))
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer2(self.norm(self.layer1(images)).relu())
        return self.head(self.stage1(features).relu().mean((2, 3)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        outputs = self(images)
        self.log("val_loss", nn.functional.cross_entropy(outputs, labels))
        self.log("val_acc", (outputs.argmax(1) == labels).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Data(pl.LightningDataModule):
    """The same few images for everything."""

    def train_dataloader(self) -> DataLoader:
        return loader()

    def val_dataloader(self) -> DataLoader:
        return loader()

    def test_dataloader(self) -> DataLoader:
        return loader()


class Trainer(pl.Trainer):
    """Quiet, on the CPU, and leaves ``last.ckpt`` behind as readers' checkpoint callbacks do."""

    def __init__(self, **kwargs: Any) -> None:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        super().__init__(**{"accelerator": "cpu", "devices": 1, **dict.fromkeys(quiet, False), **kwargs})

    def fit(self, *args: Any, **kwargs: Any) -> None:
        super().fit(*args, **kwargs)
        self.save_checkpoint("last.ckpt")


def time_of(module: nn.Module, inputs: Any) -> float:
    """Return the size for the time of a module: ones as small as these take the same, whatever their size."""
    return float(sum(parameter.numel() for parameter in module.parameters()))


def names() -> dict[str, Any]:
    """Return everything that a block may name; files go to the working directory."""
    trainer = Trainer(max_epochs=1)
    trainer.strategy.connect(Net())
    trainer.save_checkpoint("c.ckpt", weights_only=True)
    images, tuned = dataset().tensors[0], Net()
    small = {"make_small": lambda: Net(4), "make_wide": lambda: Net(16), "make_deep": lambda: Net(8)}
    return {
        "so": so, "pl": pl, "torch": torch, "nn": nn, "DataLoader": DataLoader, "Path": Path,
        # modules
        "MyModule": Net, "Net": Net, "Student": Net, "module": Net(), "teacher": Net(16), "student": Net(),
        "model": Net(), "a": Net(), "b": Net(4), "dense": Net(), "pruned": Net(),
        **{f"net_{letter}": Net(width) for letter, width in zip("abc", (8, 6, 4), strict=True)},
        "tuned_a": tuned, "tuned_b": deepcopy(tuned),  # of one start
        **small, "candidates": small,
        "body": lambda width: nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)),
        # data
        "datamodule": Data(), "data": Data(), "dataset": dataset(), "x": images[:8], "example_input": images[:8],
        **dict.fromkeys(("train", "val", "held_out", "test_loader", "loader"), loader()),
        # the rest
        "trainer": Trainer(max_epochs=1), "metric": MulticlassAccuracy(CLASSES, average="micro"),
    }  # fmt: skip
