"""What each criterion costs: per training step, and per pruning decision.

Every criterion prunes the same network every 10 optimizer steps, in a Trainer of its own. Within a round all
train in random order; ratios are of medians over the rounds. The unpruned network runs twice, to show the noise.
Criteria by training gradients and inputs collect at every step; those with a calibration batch do all their work
when they decide.
"""

import random
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch
from common import Batches, Classifier, parse_arguments, quiet_trainer, write_json
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import nn

import lightning_structopt as so

STEPS, EVERY, BATCH_SIZE = 60, 10, 64
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
WARM_UP = 3  # steps that don't count: caches are cold


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 2048),
        nn.BatchNorm1d(2048),
        nn.ReLU(),
        nn.Linear(2048, 2048),
        nn.BatchNorm1d(2048),
        nn.ReLU(),
        nn.Linear(2048, 10),
    )


def batches(count: int) -> Batches:
    return Batches(torch.randn(count * BATCH_SIZE, 784), torch.randint(10, (count * BATCH_SIZE,)), BATCH_SIZE)


def pruning(criterion: so.Criterion, **options: Any) -> so.IterativePruning:
    options = {"sparsity": 0.9, "begin": 0.1, "interval": "step", "every": EVERY, "verbose": False} | options
    return so.IterativePruning(criterion=criterion, **options)


def calibration() -> so.Calibration:
    return so.Calibration(batches(1))


NEURONS = {"pattern": so.Neurons(), "spare": "last"}
ENTRANTS: dict[str, Callable[[], list[Callback]]] = {
    "unpruned": lambda: [],
    "unpruned, again": lambda: [],
    "Magnitude": lambda: [pruning(so.Magnitude())],
    "Random": lambda: [pruning(so.Random(seed=0))],
    "LAMP": lambda: [pruning(so.LAMP())],
    "GeometricMedian": lambda: [pruning(so.GeometricMedian(), **NEURONS)],
    "BatchNormScale": lambda: [pruning(so.BatchNormScale(), **NEURONS)],
    "Taylor": lambda: [pruning(so.Taylor())],
    "GradientSquared": lambda: [pruning(so.GradientSquared())],
    "Movement": lambda: [pruning(so.Movement())],
    "Wanda": lambda: [pruning(so.Wanda())],
    "Taylor, 1 batch": lambda: [pruning(so.Taylor(calibration=calibration()))],
    "HessianDiagonal, 1 batch": lambda: [pruning(so.HessianDiagonal(calibration()))],
    "JacobianImportance, 1 batch": lambda: [pruning(so.JacobianImportance(calibration()))],
}


class StepTimer(Callback):
    """Times whole steps, and notes how many weights are zero at the start of each."""

    def __init__(self) -> None:
        self.starts: list[float] = []
        self.sparsity: list[float] = []

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        found = [c.sparsity for c in trainer.callbacks if isinstance(c, so.IterativePruning)]
        self.sparsity += found or [0.0]
        self.starts.append(perf_counter())

    def times(self) -> tuple[float, float]:
        """Return the median of steps without a decision, and the mean that a decision adds, in seconds."""
        spans = [end - start for start, end in zip(self.starts, self.starts[1:], strict=False)]
        decided = [after > before for before, after in zip(self.sparsity, self.sparsity[1:], strict=False)]
        plain = median(span for span, it in list(zip(spans, decided, strict=True))[WARM_UP:] if not it)
        return plain, mean([span - plain for span, it in zip(spans, decided, strict=True) if it] or [0.0])


def run(make: Callable[[], list[Callback]], data: Batches) -> tuple[float, float]:
    torch.manual_seed(0)
    timer = StepTimer()
    quiet_trainer(max_epochs=1, callbacks=[timer, *make()]).fit(Classifier(perceptron(), SGD), data)
    return timer.times()


def race(rounds: int, steps: int) -> list[dict[str, Any]]:
    data, order = batches(steps), random.Random(0)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ENTRANTS}
    for _ in range(rounds):
        for name in order.sample(list(ENTRANTS), len(ENTRANTS)):
            found[name].append(run(ENTRANTS[name], data))
    steps_ms = {name: 1000 * median(step for step, _ in times) for name, times in found.items()}
    decisions_ms = {name: 1000 * median(decision for _, decision in times) for name, times in found.items()}
    base = steps_ms["unpruned"]
    return [
        {
            "criterion": name,
            "step_ms": steps_ms[name],
            "ratio": steps_ms[name] / base,
            "decision_ms": decisions_ms[name],
            "decision_steps": decisions_ms[name] / base,
        }
        for name in ENTRANTS
    ]


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("criterion", "step (ms)", "x unpruned", "decision (ms)", "decision (unpruned steps)")
    table = Table(*columns, title="Perceptron 784-2048-2048-10 with batch norm, 64 samples a step")
    for row in rows:
        table.add_row(
            row["criterion"],
            f"{row['step_ms']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['decision_ms']:.0f}",
            f"{row['decision_steps']:.1f}",
        )
    Console(width=100).print(table)


def main() -> None:
    arguments = parse_arguments("criteria", __doc__, rounds=7)
    rounds, steps = (1, 24) if arguments.fast else (arguments.rounds, STEPS)
    rows = race(rounds, steps)
    show(rows)
    write_json(arguments.output, "criteria", rows)


if __name__ == "__main__":
    main()
