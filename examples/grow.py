"""Train a small net, let it grow when it gets no better, and compare it with the large net from scratch.

    python examples/grow.py                        # handwritten digits, about half a minute
    python examples/grow.py --deepen               # one more layer too
    python examples/grow.py --data fashion-mnist   # 60,000 images, where they are found

Growth keeps the function: accuracy goes on where the small net was. Prints the epochs that each takes to some
accuracies and, where matplotlib is installed, draws `grow.png`.
"""

import argparse
import logging
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from data import load
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_structopt.growth import Deepen, NetworkGrowth, Plateau, Widen

TARGETS = (0.9, 0.95, 0.97, 0.98)


class Classifier(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of growth."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2 * width * places, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class History(pl.Callback):
    """Keeps accuracies, sizes and the time since the start."""

    def __init__(self) -> None:
        self.accuracies: list[float] = []
        self.parameters: list[int] = []
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.accuracies.append(float(trainer.callback_metrics["val_acc"]))
        self.parameters.append(sum(each.numel() for each in module.parameters()))
        self.seconds.append(time.perf_counter() - self.begin)


def train(width: int, data: tuple[Tensor, ...], epochs: int, *callbacks: pl.Callback) -> History:
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = data
    history = History()
    pl.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, history],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    ).fit(
        Classifier(width, (train_x.shape[-1] // 4) ** 2),
        DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True),
        DataLoader(TensorDataset(test_x, test_y), batch_size=1000),
    )
    return history


def show(console: Console, histories: dict[str, History]) -> None:
    table = Table("net", title="Epochs (and seconds) until an accuracy is reached")
    for column in ("size", *(f"{target:.0%}" for target in TARGETS), "best"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, history in histories.items():
        cells = [f"{history.parameters[-1]:,}", *(reached(history, target) for target in TARGETS)]
        table.add_row(name, *cells, f"{max(history.accuracies):.2%}")
    console.print(table)


def reached(history: History, target: float) -> str:
    for epoch, accuracy in enumerate(history.accuracies):
        if accuracy >= target:
            return f"{epoch + 1} ({history.seconds[epoch]:.1f})"
    return "-"


def draw(histories: dict[str, History], path: str) -> bool:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axis = pyplot.subplots(figsize=(6, 4))
    for name, history in histories.items():
        axis.plot(history.seconds, history.accuracies, marker=".", label=name)
    axis.set(
        xlabel="seconds of training", ylabel="accuracy on test images", title="Growing and starting large"
    )
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=int, default=8, help="of the small net")
    parser.add_argument("--factor", type=float, default=4.0)
    parser.add_argument("--patience", type=int, default=1)
    parser.add_argument("--deepen", action="store_true", help="add a layer too")
    parser.add_argument("--fast", action="store_true", help="three epochs, to see that it runs")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data, epochs = load(arguments.data), 3 if arguments.fast else arguments.epochs
    growth = NetworkGrowth(
        [1] if arguments.fast else Plateau("val_acc", mode="max", patience=arguments.patience),
        widen=Widen(arguments.factor),
        deepen=Deepen() if arguments.deepen else None,
    )
    histories = {
        "small": train(arguments.width, data, epochs),
        "grown": train(arguments.width, data, epochs, growth),
        "large": train(round(arguments.width * arguments.factor), data, epochs),
    }
    console = Console()
    show(console, histories)
    if not arguments.fast and draw(histories, "grow.png"):
        console.print("Written to grow.png")


if __name__ == "__main__":
    main()
