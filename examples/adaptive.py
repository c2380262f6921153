"""Train a net that decides per image how much of itself to run, and see what that costs and saves.

    python examples/adaptive.py                        # handwritten digits
    python examples/adaptive.py --gates 0.5            # gates that are open for half of the images
    python examples/adaptive.py --data fashion-mnist   # 60,000 images, where they are found

The net has gated residual blocks and three exits. After training, the threshold of its exits is fitted on held-out
images for several budgets. Prints, for each, the accuracy, what ran, and the time in full and adaptive.
"""

import argparse
import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from data import load
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import lightning_structopt as so
from lightning_structopt.blocks import dense
from lightning_structopt.profiling import latency

BUDGETS = (0.4, 0.6, 0.8, 1.0)


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def stage(inputs: int, width: int, stride: int) -> nn.Module:
    """Return a convolution and a gated block."""
    body = nn.Sequential(*convolution(width, width), *convolution(width, width)[:2])
    return nn.Sequential(
        *convolution(inputs, width, stride),
        so.GatedBlock(body, so.Gate(width), activation="relu", cost=width),
    )


def head(width: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Classifier(pl.LightningModule):
    """A LightningModule like yours, with one line for what the blocks add to the loss."""

    def __init__(self, gates: float, lr: float = 2e-3) -> None:
        super().__init__()
        self.lr, self.budget = lr, so.GateBudget(gates, strength=2.0)
        stages = [stage(1, 32, 1), stage(32, 64, 2), stage(64, 128, 1)]
        self.net = so.EarlyExit(stages, [head(32), head(64), head(128)])

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return self.net.loss(self(images), labels) + so.auxiliary_loss(self, self.budget)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


@torch.no_grad()
def row(module: Classifier, images: Tensor, labels: Tensor, seconds: float) -> dict[str, float]:
    """Return accuracy, what ran, and milliseconds by batch size."""
    outputs = module.eval()(images)
    gates = [block.executed_fraction for block in module.modules() if isinstance(block, so.GatedBlock)]
    found = {
        "accuracy": float((outputs.argmax(1) == labels).float().mean()),
        "stages run": module.net.executed_fraction,
        "gates open": sum(gates) / len(gates),
    }
    for size in (64, 1):
        found[f"adaptive, {size}"] = latency(module, images[:64], batch_size=size, seconds=seconds).median_ms
        with dense(module):
            full = latency(module, images[:64], batch_size=size, seconds=seconds)
            found[f"in full, {size}"] = full.median_ms
    return found


def verdict(rows: list[dict[str, float]], size: int) -> str:
    slower = [
        f"{budget:g}"
        for budget, found in zip(BUDGETS, rows, strict=True)
        if found[f"adaptive, {size}"] >= found[f"in full, {size}"]
    ]
    if not slower:
        return f"At batch {size} adaptive is faster at every budget."
    return f"At batch {size} adaptive is SLOWER than running in full at a budget of {', '.join(slower)}."


def show(console: Console, rows: list[dict[str, float]]) -> None:
    table = Table("budget", title="The same outputs, adaptive and in full")
    for column in ("accuracy", "stages run", "gates open", "64: ms", "in full", "1: ms", "in full"):
        table.add_column(column, justify="right")
    for budget, found in zip(BUDGETS, rows, strict=True):
        shares = [f"{found[name]:.3f}" for name in ("accuracy", "stages run", "gates open")]
        times = [f"{found[f'{how}, {size}']:.2f}" for size in (64, 1) for how in ("adaptive", "in full")]
        table.add_row(f"{budget:g}", *shares, *times)
    console.print(table)
    for size in (64, 1):
        console.print(verdict(rows, size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--gates", type=float, default=0.6, help="share of the gated work to do")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--fast", action="store_true", help="one epoch, to see that it runs")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pl.seed_everything(0, verbose=False)
    train_x, train_y, test_x, test_y = load(arguments.data)
    train, held_out = random_split(TensorDataset(train_x, train_y), [0.85, 0.15])
    held_out_loader = DataLoader(held_out, batch_size=256)

    module = Classifier(arguments.gates)
    module.example_input_array = test_x[:64]  # for the report
    pl.Trainer(
        max_epochs=1 if arguments.fast else arguments.epochs,
        callbacks=[so.AdaptiveReport(), so.LRDecay(so.Cosine(minimum=0.05))],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    ).fit(module, DataLoader(train, batch_size=64, shuffle=True), held_out_loader)

    rows = []
    for budget in BUDGETS:
        module.net.fit_threshold(held_out_loader, budget)
        rows.append(row(module, test_x, test_y, seconds=0.02 if arguments.fast else 0.5))
    show(Console(), rows)


if __name__ == "__main__":
    main()
