"""Train a small convolutional network dense, then with 90% of its weights pruned, and compare the two.

    python examples/quickstart.py                        # handwritten digits, about half a minute
    python examples/quickstart.py --seeds 3              # mean and spread over three seeds
    python examples/quickstart.py --data fashion-mnist   # 60,000 images, where they are found

Prints a table and, where matplotlib is installed, draws `quickstart.png`.
"""

import argparse
import gzip
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from data import load
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_structopt as so


class ConvClassifier(pl.LightningModule):
    """A LightningModule like yours: it knows nothing of pruning or of decay."""

    def __init__(self, image_size: int, classes: int = 10) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (image_size // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, classes),
        )  # fmt: skip
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def pruning_callbacks(sparsity: float) -> list[pl.Callback]:
    """All that changes between the two runs."""
    return [
        so.IterativePruning(sparsity, interval="step", every=10, verbose=False),
        so.LRDecay(so.Cosine(minimum=0.1)),
    ]


class History(pl.Callback):
    """Remembers accuracy and sparsity after each epoch, for the plot."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.sparsity: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pruning = [c for c in trainer.callbacks if isinstance(c, so.IterativePruning)]
        self.accuracy.append(float(trainer.callback_metrics["test_accuracy"]))
        self.sparsity.append(pruning[0].sparsity if pruning else 0.0)


@dataclass
class Runs:
    """What the runs of one kind measured, one value a seed."""

    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    nonzero: list[float] = field(default_factory=list)
    size_kb: list[float] = field(default_factory=list)
    compressed_kb: list[float] = field(default_factory=list)
    histories: list[History] = field(default_factory=list)

    def measure(self, module: pl.LightningModule, history: History, seconds: float) -> None:
        buffer = io.BytesIO()
        torch.save(module.state_dict(), buffer)
        self.accuracy.append(100 * history.accuracy[-1])
        self.seconds.append(seconds)
        self.nonzero.append(sum(int(p.count_nonzero()) for p in module.parameters()))
        self.size_kb.append(len(buffer.getvalue()) / 1024)
        self.compressed_kb.append(len(gzip.compress(buffer.getvalue())) / 1024)
        self.histories.append(history)


def train(
    seed: int,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    callbacks: list[pl.Callback],
    epochs: int,
    runs: Runs,
) -> None:
    pl.seed_everything(seed, verbose=False)
    train_images, train_labels, test_images, test_labels = data
    batch_size = 32 if len(train_images) < 10_000 else 128
    loader = DataLoader(TensorDataset(train_images, train_labels), batch_size, shuffle=True)
    test_loader = DataLoader(TensorDataset(test_images, test_labels), 512)
    module, history = ConvClassifier(train_images.shape[-1]), History()
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, history, RichProgressBar(leave=False)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    start = time.perf_counter()
    trainer.fit(module, loader, test_loader)
    runs.measure(module, history, time.perf_counter() - start)


def show(kinds: dict[str, Runs]) -> Table:
    table = Table(title="Dense and pruned")
    table.add_column("")
    rows: dict[str, tuple[Callable[[Runs], list[float]], str]] = {
        "accuracy on test data, %": (lambda runs: runs.accuracy, ".2f"),
        "nonzero parameters": (lambda runs: runs.nonzero, ",.0f"),
        "file, KiB": (lambda runs: runs.size_kb, ",.1f"),
        "file compressed, KiB": (lambda runs: runs.compressed_kb, ",.1f"),
        "training time, s": (lambda runs: runs.seconds, ".1f"),
    }
    for name in kinds:
        table.add_column(name, justify="right")
    for label, (values_of, form) in rows.items():
        table.add_row(label, *(_mean_and_spread(values_of(runs), form) for runs in kinds.values()))
    return table


def _mean_and_spread(values: list[float], form: str) -> str:
    mean = format(statistics.mean(values), form)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {format(spread, form)}" if spread else mean


def draw(kinds: dict[str, Runs], path: str) -> bool:
    """Draw the curves into ``path``; return False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, sizes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, (name, runs) in zip(("tab:gray", "tab:blue"), kinds.items(), strict=True):
        for history in runs.histories:
            epochs = range(1, len(history.accuracy) + 1)
            curves.plot(epochs, [100 * a for a in history.accuracy], color=color, alpha=0.8)
        curves.plot([], [], color=color, label=name)
    *_, pruned = kinds.values()
    sparsity = curves.twinx()
    sparsity.fill_between(
        range(1, len(pruned.histories[0].sparsity) + 1),
        [100 * s for s in pruned.histories[0].sparsity],
        color="tab:blue", alpha=0.12,
    )  # fmt: skip
    sparsity.set(ylim=(0, 100), ylabel="sparsity, % (shaded)")
    curves.set(xlabel="epoch", ylabel="accuracy on test data, %", title="While training", ylim=(80, 100))
    curves.set_zorder(sparsity.get_zorder() + 1)
    curves.patch.set_visible(False)
    curves.legend(loc="lower right")
    bars = sizes.bar(list(kinds), [statistics.mean(runs.compressed_kb) for runs in kinds.values()], width=0.5)
    bars[0].set_color("tab:gray")
    sizes.bar_label(bars, fmt="%.0f KiB")
    sizes.set(title="Compressed file", ylabel="KiB")
    figure.savefig(path, dpi=120)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of weights to prune")
    parser.add_argument("--epochs", type=int, default=None, help="30 on digits, 8 on Fashion-MNIST")
    parser.add_argument("--fast", action="store_true", help="two epochs, to see that it runs")
    arguments = parser.parse_args()

    console = Console()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = load(arguments.data)
    if arguments.data == "digits":
        torch.set_num_threads(1)  # images this small are done before a second thread has woken up
    epochs = 2 if arguments.fast else arguments.epochs or (30 if arguments.data == "digits" else 8)
    dense, pruned = Runs(), Runs()
    for seed in range(arguments.seeds):
        console.print(
            f"Seed {seed}: {epochs} epochs dense, {epochs} epochs pruned to {arguments.sparsity:.0%}"
        )
        train(seed, data, [], epochs, dense)
        train(seed, data, pruning_callbacks(arguments.sparsity), epochs, pruned)
    kinds = {"dense": dense, f"pruned to {arguments.sparsity:.0%}": pruned}
    console.print(show(kinds))
    if draw(kinds, "quickstart.png"):
        console.print("Drawn: quickstart.png")


if __name__ == "__main__":
    main()
