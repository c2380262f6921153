"""What pruning costs per training step: unpruned, IterativePruning and Lightning's ModelPruning.

Every entrant trains inside a Trainer of its own. Short segments of training take turns in random order, so
that whatever else the machine does hits all of them alike, and each ratio compares segments of one round. The
unpruned model runs twice: the second one's ratio to the first shows the noise.

Each is measured twice: just after pruning and 1,000 steps later. That makes a difference on CPUs, which are
slow at denormal numbers: to those decays the momentum of a pruned weight, unless it is set to zero.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, parse_arguments, quiet_trainer, write_json
from lightning.pytorch.callbacks import Callback, ModelPruning
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_structopt.pruning import IterativePruning, OneShotRamp

SPARSITY = 0.9
WARM_UP = 3  # steps at the start of a segment that don't count: caches are cold
SETTLING = 1000  # steps between the two measurements: 0.9**1000 is below the smallest float
LR = 1e-6  # weights hardly move, so that nobody's numbers run into slow denormals

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=LR),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
}


@dataclass(frozen=True)
class Task:
    """A network, its batches, and how many steps of a segment count."""

    build: Callable[[], nn.Module]
    batch_size: int
    inputs: tuple[int, ...]
    steps: int


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
    )


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


class Encoder(nn.Module):
    """A 4-layer TransformerEncoder that classifies the mean of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, nhead=4, dim_feedforward=1024, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4)
        self.head = nn.Linear(256, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(inputs).mean(1))


TASKS = {
    "MLP": Task(mlp, 64, (784,), 16),
    "ResNet-18": Task(resnet18, 32, (3, 64, 64), 5),
    "TransformerEncoder": Task(Encoder, 16, (64, 256), 8),
}


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net = net
        self.optimizer = make_optimizer(net.parameters())  # one for all segments, which go on with its state

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def prunable(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every weight of two or more dimensions with its module: what both callbacks prune."""
    return [
        (module, name)
        for module in net.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    ]


def with_even_scale(net: nn.Module) -> nn.Module:
    """Draw all weights at one scale: at the default one a global threshold would empty whole layers."""
    for module, name in prunable(net):
        nn.init.normal_(getattr(module, name), std=0.02)
    return net


def iterative_pruning(net: nn.Module) -> list[Callback]:
    ramp = OneShotRamp()
    return [IterativePruning(SPARSITY, ramp=ramp, begin=0, end=0.01, interval="step", verbose=False)]


def model_pruning(net: nn.Module) -> list[Callback]:
    """Prune at the end of the first epoch, and only then; no copies for lottery tickets."""
    return [
        ModelPruning(
            "l1_unstructured",
            parameters_to_prune=prunable(net),
            amount=SPARSITY,
            apply_pruning=lambda epoch: epoch == 0,
            use_lottery_ticket_hypothesis=False,
            make_pruning_permanent=False,
        )
    ]


ENTRANTS: dict[str, Callable[[nn.Module], list[Callback]]] = {
    "unpruned": lambda net: [],
    "unpruned, again": lambda net: [],
    "IterativePruning": iterative_pruning,
    "ModelPruning": model_pruning,
}


class StepTimer(Callback):
    """Times whole steps, from the start of one batch to the start of the next: data, step and every hook."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.starts.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.starts.append(perf_counter())

    def step_ms(self) -> float:
        """Return the median step of the last segment."""
        spans = zip(self.starts[WARM_UP:], self.starts[WARM_UP + 1 :], strict=False)
        return 1000 * median(end - start for start, end in spans)


def random_batches(task: Task, steps: int, batch_size: int) -> Batches:
    inputs = torch.randn(steps * batch_size, *task.inputs)
    return Batches(inputs, torch.randint(10, (len(inputs),)), batch_size)


@dataclass
class Entrant:
    """A module with its Trainer and the times of its segments."""

    task: Task
    make_optimizer: MakeOptimizer
    make_callbacks: Callable[[nn.Module], list[Callback]]
    times_ms: list[float] = field(default_factory=list)
    crash: str | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.module = Classifier(with_even_scale(self.task.build()), self.make_optimizer)
        self.batches = random_batches(self.task, WARM_UP + self.task.steps + 1, self.task.batch_size)
        # Nobody prunes before the optimizer has met each weight: Adam is slow at second moments of exactly zero.
        quiet_trainer(max_epochs=1).fit(self.module, self.batches)
        self.timer = StepTimer()
        callbacks = [self.timer, *self.make_callbacks(self.module.net)]
        self.trainer = quiet_trainer(max_epochs=0, callbacks=callbacks)

    def train(self, batches: Batches) -> None:
        """Go on for one epoch: the next `fit` of the same Trainer."""
        if self.crash is None:
            self.trainer.fit_loop.max_epochs += 1
            try:
                self.trainer.fit(self.module, batches)
            except RuntimeError as error:
                self.crash = str(error).partition("\n")[0]

    def measure(self) -> None:
        self.train(self.batches)
        if self.crash is None:
            self.times_ms.append(self.timer.step_ms())

    def sparsity(self) -> float:
        """Return the share of zeros among the weights that a forward pass uses."""
        weights = [getattr(module, name.removesuffix("_orig")) for module, name in prunable(self.module.net)]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def contest(
    task: Task, make_optimizer: MakeOptimizer, rounds: int, settling: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for every entrant: first just after pruning, then after ``settling`` steps if there are any."""
    entrants = {name: Entrant(task, make_optimizer, make) for name, make in ENTRANTS.items()}
    for entrant in entrants.values():
        entrant.train(entrant.batches)  # ModelPruning prunes at the end of this
    yield from race(entrants, rounds, after=0)
    if settling == 0:
        return
    for entrant in entrants.values():
        entrant.train(random_batches(task, settling, batch_size=2))
    yield from race(entrants, rounds, after=settling)


def race(entrants: dict[str, Entrant], rounds: int, after: int) -> Iterator[dict[str, Any]]:
    order = random.Random(0)
    for entrant in entrants.values():
        entrant.times_ms.clear()
    for _ in range(rounds):
        for entrant in order.sample(list(entrants.values()), len(entrants)):
            entrant.measure()
    for name, entrant in entrants.items():
        yield {"entrant": name, "after_steps": after} | figures(entrant, entrants["unpruned"])


def figures(entrant: Entrant, unpruned: Entrant) -> dict[str, Any]:
    if entrant.crash is not None:
        return {"crash": entrant.crash}
    ratios = [mine / base for mine, base in zip(entrant.times_ms, unpruned.times_ms, strict=True)]
    lower, middle, upper = quantiles(ratios, n=4, method="inclusive")
    return {
        "sparsity": entrant.sparsity(),
        "step_ms": median(entrant.times_ms),
        "ratio": middle,
        "quartiles": [lower, upper],
    }


def cells(row: dict[str, Any]) -> list[str]:
    labels = [row["task"], row["entrant"], f"{row['after_steps']:,}"]
    if "crash" in row:
        return [*labels, "", "", "crash", ""]
    lower, upper = row["quartiles"]
    numbers = [f"{row['sparsity']:.3f}", f"{row['step_ms']:.1f}", f"{row['ratio']:.3f}"]
    return [*labels, *numbers, f"{lower:.3f} to {upper:.3f}"]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = ("task", "entrant", "steps since", "sparsity", "step (ms)", "x unpruned", "quartiles")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=110)
    console.print(table)
    for crash in {f"{row['entrant']}, {row['task']}: {row['crash']}" for row in rows if "crash" in row}:
        console.print(crash)


def main() -> None:
    arguments = parse_arguments("step_cost", __doc__, rounds=16, settling=SETTLING)
    rounds, settling = (2, 5) if arguments.fast else (arguments.rounds, arguments.settling)
    rows: list[dict[str, Any]] = []
    for optimizer in ["Adam"] if arguments.fast else OPTIMIZERS:
        block: list[dict[str, Any]] = []
        for name, task in TASKS.items():
            task = replace(task, batch_size=4, steps=1) if arguments.fast else task
            labels = {"optimizer": optimizer, "task": name, "rounds": rounds}
            block += [labels | row for row in contest(task, OPTIMIZERS[optimizer], rounds, settling)]
        show(optimizer, block)
        rows += block
    write_json(arguments.output, "step_cost", rows)


if __name__ == "__main__":
    main()
