"""Take half of a network's operations away for real, after training or while it trains, and compare.

    python examples/shrink.py                        # handwritten digits
    python examples/shrink.py --keep 0.3             # keep 30% of the operations
    python examples/shrink.py --data fashion-mnist   # 60,000 images, where they are found

Prints a table of quality, size and speed, and writes `shrink.html` and, where onnx is installed, `shrink.onnx`.
"""

import argparse
import logging
import warnings
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
import torch
from data import load
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_structopt as so


class Residual(nn.Module):
    """Two convolutions and a shortcut, whose channels can only go together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.relu(inputs + self.body(inputs))


class Classifier(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of channels that may go."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Residual(32), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), Residual(64),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(
    module: pl.LightningModule, loader: DataLoader, epochs: int, *callbacks: pl.Callback
) -> so.CostMonitor:
    """Train and return what it took."""
    monitor = so.CostMonitor()
    pl.Trainer(
        max_epochs=epochs,
        callbacks=[monitor, so.LRDecay(so.Cosine(minimum=0.05)), *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, loader)
    return monitor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--keep", type=float, default=0.5, help="fraction of operations to keep")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    console, epochs = Console(), 1 if arguments.fast else arguments.epochs
    train_x, train_y, test_x, test_y = load(arguments.data)
    train = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(test_x, test_y), batch_size=256)

    pl.seed_everything(0, verbose=False)
    dense = Classifier()
    console.print("Training the dense network")
    costs = {"dense": fit(dense, train, epochs)}
    small = so.prune_channels(dense, so.FLOPs(arguments.keep), train_x[:2])
    assert isinstance(small, Classifier), "still the same class, so it trains and saves as before"
    console.print("Fine-tuning the small one")
    costs["small"] = fit(small, train, max(1, epochs // 2))

    console.print("Training one that gets small meanwhile")
    gradual = Classifier()
    pruning = so.ChannelPruning(so.FLOPs(arguments.keep), interval="step", every=10, end=0.6, remove="now")
    costs["meanwhile"] = fit(gradual, train, epochs + max(1, epochs // 2), pruning)

    modules = {"dense": dense, "small": small, "meanwhile": gradual}
    report = so.compare(modules, test, example_input=test_x[:64], training=costs)
    console.print(report)
    report.to_html("shrink.html")
    console.print("Written: shrink.html")
    if find_spec("onnx") and find_spec("onnxscript"):
        torch.onnx.export(small.eval(), (test_x[:2],), "shrink.onnx", dynamo=True)
        console.print("Written: shrink.onnx")


if __name__ == "__main__":
    main()
