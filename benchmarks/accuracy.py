"""Accuracy after pruning on Fashion-MNIST: ours, Lightning's ModelPruning, the dense model.

LeNet-300-100 by default, with dynamic sparse training beside it; a small ResNet by `--network resnet`.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from statistics import mean, stdev
from typing import Any

import torch
from common import Batches, Classifier, images, parse_arguments, quiet_trainer, top1, write_as_they_come
from lightning.pytorch.callbacks import Callback, ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.pruning import (
    CubicRamp,
    ErdosRenyi,
    IterativePruning,
    NByM,
    OneShotRamp,
    Random,
    RigL,
    Taylor,
    Unstructured,
)

BATCH_SIZE, LR = 128, 1.2e-3
SEEDS = 4  # even so, the means of two equal contenders differ by up to 0.25 points
SPARSITIES = (0.90, 0.95, 0.98, 0.99)

Contender = Callable[["Trained", float], list[Callback]]


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.relu(self.body(inputs) + self.shortcut(inputs))


def resnet() -> nn.Module:
    """Return a ResNet of 8 layers and 77,000 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(memory_format=torch.channels_last)  # a third faster on the CPU


@dataclass(frozen=True)
class Network:
    """What is trained, for how long, and until when ramps by the epoch take a step at the end of each."""

    build: Callable[[], nn.Module]
    epochs: int
    ramp_epochs: int


NETWORKS = {"lenet": Network(lenet, 12, 8), "resnet": Network(resnet, 4, 3)}


class Trained(Classifier):
    """A classifier whose layers can be named to Lightning's callback."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.build(), partial(torch.optim.AdamW, lr=LR))
        self.network = network

    def layers(self) -> list[nn.Module]:
        return [layer for layer in self.net.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def model_pruning(module: Trained, sparsity: float) -> list[Callback]:
    """Lightning's callback on our ramp: its amounts add up, so each is the number of weights that are due."""
    module.to(memory_format=torch.contiguous_format)  # `torch.nn.utils.prune` crashes at any other layout
    total = sum(layer.weight.numel() for layer in module.layers())

    def pruned_after(epochs: int) -> int:
        return round(total * CubicRamp()(min(epochs / module.network.ramp_epochs, 1), sparsity))

    return [
        ModelPruning(
            "l1_unstructured",
            parameters_to_prune=[(layer, "weight") for layer in module.layers()],
            amount=lambda epoch: pruned_after(epoch + 1) - pruned_after(epoch),
            use_lottery_ticket_hypothesis=False,
        )
    ]


def same_ramp(module: Trained, sparsity: float) -> list[Callback]:
    network = module.network
    return [IterativePruning(sparsity, begin=0, end=network.ramp_epochs / network.epochs, verbose=False)]


def stepwise(module: Trained, sparsity: float) -> list[Callback]:
    return [IterativePruning(sparsity, begin=0.1, end=0.75, interval="step", every=50, verbose=False)]


def by_gradient(module: Trained, sparsity: float) -> list[Callback]:
    criterion = Taylor()
    return [
        IterativePruning(
            sparsity, criterion=criterion, begin=0.1, end=0.75, interval="step", every=50, verbose=False
        )
    ]


def static(module: Trained, sparsity: float, regrow: RigL | None = None) -> list[Callback]:
    """Train a random mask with more weights left in small layers, from the first step on."""
    pattern = Unstructured("layer", ErdosRenyi())
    return [
        IterativePruning(
            sparsity,
            criterion=Random(seed=0),
            pattern=pattern,
            ramp=OneShotRamp(),
            begin=0,
            interval="step",
            regrow=regrow,
            verbose=False,
        )
    ]


def rigl(module: Trained, sparsity: float) -> list[Callback]:
    return static(module, sparsity, RigL(fraction=0.3, every=100, until=0.75))


def two_of_four(module: Trained, sparsity: float) -> list[Callback]:
    """Prune two of each four weights that an output reads; a convolution of one channel has no four."""
    odd = [name for name, weight in module.named_parameters() if weight.ndim == 4 and weight.shape[1] % 4]
    return [
        IterativePruning(
            sparsity,
            pattern=NByM(2, 4),
            begin=0.1,
            interval="step",
            every=50,
            exclude=odd or None,
            verbose=False,
        )
    ]


MODEL_PRUNING = "ModelPruning, cubic by epoch"
CONTENDERS: dict[str, Contender] = {
    "dense": lambda module, sparsity: [],
    "2:4": two_of_four,
    MODEL_PRUNING: model_pruning,
    "IterativePruning, the same ramp": same_ramp,
    "IterativePruning, every 50 steps": stepwise,
    "IterativePruning, every 50 steps, Taylor": by_gradient,
    "random ERK mask": static,
    "RigL": rigl,
}


def train(
    contender: Contender, sparsity: float, seed: int, data: tuple[Tensor, ...], network: Network
) -> Trained:
    """Train one model; equal seeds give equal initial weights and batches to every contender."""
    train_x, train_y, _, _ = data
    torch.manual_seed(seed)
    module = Trained(network)
    trainer = quiet_trainer(max_epochs=network.epochs, callbacks=contender(module, sparsity))
    trainer.fit(module, Batches(train_x, train_y, BATCH_SIZE, seed=seed))
    return module


def zeros(module: Trained) -> float:
    """Return the share of weights that are zero, counted in the trained model."""
    weights = [layer.weight for layer in module.layers()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@dataclass(frozen=True)
class Job:
    """One training run, small enough to send to another process."""

    contender: str
    sparsity: float
    seed: int
    network: str
    fast: bool

    def run(self) -> tuple[float, float]:
        """Return the accuracy in percent and the share of zeros."""
        torch.set_num_threads(1)  # the network is too small for more; the runs share the cores instead
        gc.collect()  # trainers and their data are cycles, and few objects: nobody else would come for gigabytes
        data = images(self.fast)
        module = train(CONTENDERS[self.contender], self.sparsity, self.seed, data, NETWORKS[self.network])
        return top1(module.eval(), data), zeros(module)


def cases_of(network: str, sparsities: tuple[float, ...]) -> list[tuple[str, float]]:
    """Return who runs at which sparsity: all of them on LeNet, on the ResNet the main ones."""
    pruned = [name for name in CONTENDERS if name not in {"dense", "2:4"}]
    if network == "resnet":
        pruned = [MODEL_PRUNING, "IterativePruning, every 50 steps"]
    return [("dense", 0.0), ("2:4", 0.5), *((name, sparsity) for sparsity in sparsities for name in pruned)]


def rows_of(
    network: str, sparsities: tuple[float, ...], seeds: tuple[int, ...], fast: bool
) -> Iterator[dict[str, Any]]:
    cases = cases_of(network, sparsities)
    jobs = [Job(name, sparsity, seed, network, fast) for name, sparsity in cases for seed in seeds]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = pool.map(Job.run, jobs)
        for name, sparsity in cases:
            scores, shares = zip(*islice(results, len(seeds)), strict=True)
            yield {
                "network": network,
                "contender": name,
                "sparsity": sparsity,
                "zeros": max(shares),
                "top1": dict(zip(seeds, scores, strict=True)),
                "mean": mean(scores),
                "std": stdev(scores) if len(scores) > 1 else 0.0,
            }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(
        "sparsity", "contender", "top-1 (%)", "by seed", title=f"Fashion-MNIST, {rows[0]['network']}"
    )
    for row in rows:
        seeds = "  ".join(f"{score:.2f}" for score in row["top1"].values())
        table.add_row(f"{row['zeros']:.2%}", row["contender"], f"{row['mean']:.2f} ± {row['std']:.2f}", seeds)
    Console().print(table)


def main() -> None:
    arguments = parse_arguments("accuracy", __doc__, choices={"network": list(NETWORKS)}, seeds=SEEDS)
    sparsities, seeds = ((0.95,), 1) if arguments.fast else (SPARSITIES, arguments.seeds)
    rows = rows_of(arguments.network, sparsities, tuple(range(seeds)), arguments.fast)
    show(write_as_they_come(arguments.output, "accuracy", rows))


if __name__ == "__main__":
    main()
