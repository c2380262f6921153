"""Sweep over six convolutional networks: all train a little, the best of them longer; two at a time.

    python examples/sweep.py                        # handwritten digits
    python examples/sweep.py --data fashion-mnist   # 60,000 images, where they are found

Prints a table, the networks that none beats in both accuracy and size, and what the best reaches on test images.
Writes everything to the folder `sweep-digits`, and the plot `sweep-digits.png`. Stop it with Ctrl-C and start it
again: it goes on where it was.
"""

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from data import load
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_structopt as so


class ConvNet(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of sweeps."""

    def __init__(self, channels: tuple[int, ...], kernel: int = 3, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        layers: list[nn.Module] = []
        for before, after in zip((1, *channels), channels, strict=False):
            convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("test_acc", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def make(channels: tuple[int, ...], kernel: int, pixels: int) -> ConvNet:
    module = ConvNet(channels, kernel)
    module(torch.zeros(2, 1, pixels, pixels))  # the last layer learns its width
    return module


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fast", action="store_true", help="four epochs, to see that it runs")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console, epochs = Console(width=120), 4 if arguments.fast else arguments.epochs
    train_x, train_y, test_x, test_y = load(arguments.data)
    train, val = random_split(TensorDataset(train_x, train_y), [0.8, 0.2], torch.Generator().manual_seed(0))
    pixels = train_x.shape[-1]

    sweep = so.ArchitectureSweep(
        candidates={
            "tiny": partial(make, (4,), 3, pixels),
            "narrow": partial(make, (8, 16), 3, pixels),
            "wide": partial(make, (32, 64), 3, pixels),
            "deep": partial(make, (16, 32, 64), 3, pixels),
            "large kernel": partial(make, (16, 32), 5, pixels),
            "huge": partial(make, (512, 512), 3, pixels),
        },
        monitor="val_acc",
        budget=so.SuccessiveHalving(min_epochs=max(1, epochs // 4), max_epochs=epochs, factor=2),
        trainer={"accelerator": "cpu"},
        executor=so.LocalProcesses(workers=arguments.workers),
        constraints=[so.MaxParameters(1_000_000)],
        directory=f"sweep-{arguments.data}{'-fast' if arguments.fast else ''}",
    )
    result = sweep.run(DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256))

    console.print(result)
    console.print(
        "Pareto:", ", ".join(candidate.name for candidate in result.pareto("val_acc", "parameters"))
    )
    result.plot(Path(f"sweep-{arguments.data}.png"), cost="parameters")
    console.print(f"Written: sweep-{arguments.data}.png")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    tested = trainer.test(result.best.load(), DataLoader(TensorDataset(test_x, test_y), 256), verbose=False)
    console.print(f"{result.best.name}: {tested[0]['test_acc']:.2%} of test images")


if __name__ == "__main__":
    main()
