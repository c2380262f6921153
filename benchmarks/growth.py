"""Epochs to the same accuracy: a grown net against the large one from scratch (`--fast`: scikit-learn's digits).

    python benchmarks/growth.py [--seeds 3] [--small 4] [--epochs 10] [--fast]

A convolutional net is trained for `--small` epochs, then all its layers are made twice as wide by Net2Net, and it is
trained on. The same large net is trained from scratch for `--epochs`; both with AdamW at a constant rate. Counted are
epochs of the large net until the accuracy of the one from scratch at its end (its mean over the last three epochs, as
single ones are noise), those with the epochs of the small net, and seconds. In the paper the small net is there,
so that its epochs don't count (Chen et al., 2016).
"""

from functools import partial
from statistics import mean
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, Classifier, images, parse_arguments, quiet_trainer, top1, write_as_they_come
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.growth import NetworkGrowth, Widen

BATCH_SIZE, WIDTH, FACTOR = 128, 16, 2
Data = tuple[Tensor, ...]


def made(width: int) -> Classifier:
    net = nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Flatten(), nn.Linear(98 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10),
    )  # fmt: skip
    return Classifier(net, partial(torch.optim.AdamW, lr=1e-3))


class History(pl.Callback):
    """The accuracy after each epoch, and the seconds of training until then."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.accuracies: list[float] = []
        self.seconds: list[float] = []
        self.total = 0.0

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.begin = perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.total += perf_counter() - self.begin
        self.seconds.append(self.total)
        self.accuracies.append(top1(module.eval(), self.data))
        module.train()


def run(
    width: int, data: Data, epochs: int, seed: int, *callbacks: pl.Callback
) -> tuple[Classifier, History]:
    torch.manual_seed(seed)
    module, history = made(width), History(data)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[*callbacks, history])
    trainer.fit(module, Batches(data[0], data[1], BATCH_SIZE, seed=seed))
    return module, history


def compared(data: Data, seed: int, small: int, epochs: int) -> dict[str, Any]:
    growth = NetworkGrowth([small], widen=Widen(float(FACTOR)), verbose=False)
    grown, with_growth = run(WIDTH, data, small + epochs, seed, growth)
    large, scratch = run(FACTOR * WIDTH, data, epochs, seed)
    shapes = [[tuple(each.shape) for each in module.parameters()] for module in (grown, large)]
    assert shapes[0] == shapes[1], "the grown net and the one from scratch must be alike"
    target = mean(scratch.accuracies[-3:])
    after = first(with_growth.accuracies[small:], target)
    return {
        "seed": seed,
        "parameters": sum(each.numel() for each in large.parameters()),
        "target": target,
        "epochs_scratch": first(scratch.accuracies, target),
        "epochs_grown": after,
        "epochs_grown_and_small": None if after is None else small + after,
        "seconds_scratch": at(scratch.seconds, first(scratch.accuracies, target)),
        "seconds_grown_and_small": at(with_growth.seconds, None if after is None else small + after),
        "best_scratch": max(scratch.accuracies),
        "best_grown": max(with_growth.accuracies[small:]),
        "accuracies_scratch": scratch.accuracies,
        "accuracies_grown": with_growth.accuracies,
    }


def first(accuracies: list[float], target: float) -> int | None:
    """Return after how many epochs the target is reached; None if it is not."""
    return next((epoch for epoch, each in enumerate(accuracies, 1) if each >= target), None)


def at(seconds: list[float], epochs: int | None) -> float | None:
    return None if epochs is None else seconds[epochs - 1]


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("seed", title="Growing against starting large")
    columns = ("target", "epochs_scratch", "epochs_grown", "epochs_grown_and_small")
    times = ("seconds_scratch", "seconds_grown_and_small", "best_scratch", "best_grown")
    for column in (*columns, *times):
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        found = [row[column] for column in (*columns, *times)]
        table.add_row(str(row["seed"]), *("-" if x is None else f"{x:.4g}" for x in found))
    Console(width=140).print(table)


def main() -> None:
    arguments = parse_arguments("growth", __doc__, seeds=3, small=4, epochs=10)
    data = images(arguments.fast)
    small, epochs, seeds = (
        (1, 2, 1) if arguments.fast else (arguments.small, arguments.epochs, arguments.seeds)
    )
    rows = (compared(data, seed, small, epochs) for seed in range(seeds))
    show(write_as_they_come(arguments.output, "growth", rows))


if __name__ == "__main__":
    main()
