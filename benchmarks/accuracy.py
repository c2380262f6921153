"""Accuracy after pruning LeNet-300-100 on Fashion-MNIST: ours, Lightning's ModelPruning, the dense model."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, parse_arguments, quiet_trainer, write_json
from data import load
from lightning.pytorch.callbacks import Callback, ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.pruning import CubicRamp, GeometricRamp, IterativePruning

EPOCHS, BATCH_SIZE, LR = 12, 128, 1.2e-3
RAMP_EPOCHS = 8  # epoch-wise ramps take a step at the end of each of the first 8 epochs
SEEDS = (0, 1, 2)
SPARSITIES = (0.90, 0.95, 0.98, 0.99)

Contender = Callable[["LeNet", float], list[Callback]]


class LeNet(pl.LightningModule):
    """LeNet-300-100, as any user would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR)

    def layers(self) -> list[nn.Linear]:
        return [layer for layer in self.net if isinstance(layer, nn.Linear)]


def model_pruning(module: LeNet, sparsity: float) -> list[Callback]:
    """Lightning's callback on our ramp: its amounts add up, so each is the number of weights that are due."""
    total = sum(layer.weight.numel() for layer in module.layers())

    def pruned_after(epochs: int) -> int:
        return round(total * CubicRamp()(min(epochs / RAMP_EPOCHS, 1), sparsity))

    return [
        ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(layer, "weight") for layer in module.layers()],
            amount=lambda epoch: pruned_after(epoch + 1) - pruned_after(epoch),
            use_lottery_ticket_hypothesis=False,
        )
    ]


def same_ramp(module: LeNet, sparsity: float) -> list[Callback]:
    return [IterativePruning(sparsity, begin=0, end=RAMP_EPOCHS / EPOCHS, verbose=False)]


def stepwise(module: LeNet, sparsity: float) -> list[Callback]:
    return [IterativePruning(sparsity, begin=0.1, end=0.75, interval="step", every=50, verbose=False)]


def geometric(module: LeNet, sparsity: float) -> list[Callback]:
    ramp = GeometricRamp()
    return [
        IterativePruning(sparsity, ramp=ramp, begin=0.1, end=0.75, interval="step", every=50, verbose=False)
    ]


CONTENDERS: dict[str, Contender] = {
    "dense": lambda module, sparsity: [],
    "ModelPruning, cubic by epoch": model_pruning,
    "IterativePruning, the same ramp": same_ramp,
    "IterativePruning, every 50 steps": stepwise,
    "IterativePruning, geometric, every 50 steps": geometric,
}


def images(fast: bool) -> tuple[Tensor, ...]:
    """Return Fashion-MNIST with the mean and deviation of its training images taken out.

    Fast runs take scikit-learn's digits, drawn larger, as Fashion-MNIST is not on every machine.
    """
    train_x, train_y, test_x, test_y = load("digits" if fast else "fashion-mnist")
    if fast:
        train_x, test_x = (nn.functional.interpolate(images, size=28) for images in (train_x, test_x))
    shift, scale = train_x.mean(), train_x.std()
    return (train_x - shift) / scale, train_y, (test_x - shift) / scale, test_y


def train(contender: Contender, sparsity: float, seed: int, data: tuple[Tensor, ...], epochs: int) -> LeNet:
    """Train one model; equal seeds give equal initial weights and batches to every contender."""
    train_x, train_y, _, _ = data
    torch.manual_seed(seed)
    module = LeNet()
    trainer = quiet_trainer(max_epochs=epochs, callbacks=contender(module, sparsity))
    trainer.fit(module, Batches(train_x, train_y, BATCH_SIZE, seed=seed))
    return module


@torch.no_grad()
def top1(module: LeNet, data: tuple[Tensor, ...]) -> float:
    """Return the percentage of test images that are classified correctly."""
    _, _, test_x, test_y = data
    return 100 * float((module.eval()(test_x).argmax(1) == test_y).float().mean())


def zeros(module: LeNet) -> float:
    """Return the share of weights that are zero, counted in the trained model."""
    weights = [layer.weight for layer in module.layers()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class Job:
    """One training run, small enough to send to another process."""

    contender: str
    sparsity: float
    seed: int
    fast: bool

    def run(self) -> tuple[float, float]:
        """Return the accuracy in percent and the share of zeros."""
        torch.set_num_threads(1)  # the network is too small for more; the runs share the cores instead
        data = images(self.fast)
        epochs = RAMP_EPOCHS + 1 if self.fast else EPOCHS
        module = train(CONTENDERS[self.contender], self.sparsity, self.seed, data, epochs)
        return top1(module, data), zeros(module)


def rows_of(sparsities: tuple[float, ...], seeds: tuple[int, ...], fast: bool) -> Iterator[dict[str, Any]]:
    cases = [("dense", 0.0), *((name, sparsity) for sparsity in sparsities for name in list(CONTENDERS)[1:])]
    jobs = [Job(name, sparsity, seed, fast) for name, sparsity in cases for seed in seeds]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = pool.map(Job.run, jobs)
        for name, sparsity in cases:
            scores, shares = zip(*islice(results, len(seeds)), strict=True)
            yield {
                "contender": name,
                "sparsity": sparsity,
                "zeros": max(shares),
                "top1": dict(zip(seeds, scores, strict=True)),
                "mean": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else 0.0,
            }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("sparsity", "contender", "top-1 (%)", "by seed", title="Fashion-MNIST, LeNet-300-100")
    for row in rows:
        seeds = "  ".join(f"{score:.2f}" for score in row["top1"].values())
        table.add_row(f"{row['zeros']:.2%}", row["contender"], f"{row['mean']:.2f} ± {row['std']:.2f}", seeds)
    Console().print(table)


def main() -> None:
    arguments = parse_arguments("accuracy", __doc__)
    sparsities, seeds = ((0.95,), (0,)) if arguments.fast else (SPARSITIES, SEEDS)
    rows = list(rows_of(sparsities, seeds, arguments.fast))
    show(rows)
    write_json(arguments.output, "accuracy", rows)


if __name__ == "__main__":
    main()
