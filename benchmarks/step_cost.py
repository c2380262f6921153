"""What pruning costs per training step: unpruned, IterativePruning and Lightning's ModelPruning.

Every entrant trains inside a Trainer of its own. Short segments of training take turns in random order, so
that whatever else the machine does hits all of them alike, and each ratio compares segments of one round. The
unpruned model runs twice: the second one's ratio to the first shows the noise.
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
WARM_UP = 3  # steps at the start of a segment that don't count: the optimizer's state is new, caches are cold
LR = 1e-6  # weights hardly move, so that nobody's numbers run into slow denormals

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=LR),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
}


@dataclass(frozen=True)
class Task:
    """A network, the shape of its inputs, and how long a segment of its training is."""

    build: Callable[[], nn.Module]
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
    "MLP 784-2048-2048-10, batch 64": Task(mlp, (64, 784), 20),
    "ResNet-18, 64x64, batch 32": Task(resnet18, (32, 3, 64, 64), 6),
    "TransformerEncoder, batch 16": Task(Encoder, (16, 64, 256), 8),
}


class Classifier(pl.LightningModule):
    def __init__(self, net: nn.Module, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def prunable(net: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return every weight of two or more dimensions with its module: what both callbacks prune."""
    return [
        (module, name)
        for module in net.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    ]


def even(net):
    for m,n in prunable(net): nn.init.normal_(getattr(m,n),std=0.02)
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
        self.module = Classifier(even(self.task.build()), self.make_optimizer)
        self.timer = StepTimer()
        callbacks = [self.timer, *self.make_callbacks(self.module.net)]
        self.trainer = quiet_trainer(max_epochs=0, callbacks=callbacks)
        batches = WARM_UP + self.task.steps + 1
        size = self.task.inputs[0]
        inputs = torch.randn(batches * size, *self.task.inputs[1:])
        self.batches = Batches(inputs, torch.randint(10, (len(inputs),)), size)

    def train(self) -> None:
        """Go on for one segment, an epoch: the next `fit` of the same Trainer."""
        self.trainer.fit_loop.max_epochs += 1
        try:
            self.trainer.fit(self.module, self.batches)
        except RuntimeError as error:
            self.crash = str(error).partition("\n")[0]

    def measure(self) -> None:
        self.train()
        if self.crash is None:
            self.times_ms.append(self.timer.step_ms())

    def sparsity(self) -> float:
        """Return the share of zeros among the weights that a forward pass uses."""
        weights = [getattr(module, name.removesuffix("_orig")) for module, name in prunable(self.module.net)]
        return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def contest(task: Task, make_optimizer: MakeOptimizer, rounds: int) -> dict[str, Entrant]:
    entrants = {name: Entrant(task, make_optimizer, make) for name, make in ENTRANTS.items()}
    for entrant in entrants.values():
        entrant.train()  # ModelPruning prunes at the end of this
    order = random.Random(0)
    for _ in range(rounds):
        alive = [entrant for entrant in entrants.values() if entrant.crash is None]
        for entrant in order.sample(alive, len(alive)):
            entrant.measure()
    return entrants


def summarize(entrants: dict[str, Entrant]) -> Iterator[dict[str, Any]]:
    for name, entrant in entrants.items():
        if entrant.crash is not None:
            yield {"entrant": name, "crash": entrant.crash}
            continue
        pairs = zip(entrant.times_ms, entrants["unpruned"].times_ms, strict=True)
        lower, middle, upper = quantiles([mine / base for mine, base in pairs], n=4, method="inclusive")
        yield {
            "entrant": name,
            "sparsity": entrant.sparsity(),
            "step_ms": median(entrant.times_ms),
            "ratio": middle,
            "quartiles": [lower, upper],
        }


def cells(row: dict[str, Any]) -> list[str]:
    if "crash" in row:
        return [row["task"], row["entrant"], "", "", "crash", ""]
    lower, upper = row["quartiles"]
    figures = [f"{row['sparsity']:.3f}", f"{row['step_ms']:.1f}", f"{row['ratio']:.3f}"]
    return [row["task"], row["entrant"], *figures, f"{lower:.3f} to {upper:.3f}"]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table("task", "entrant", "sparsity", "step (ms)", "x unpruned", "quartiles", title=title)
    for row in rows:
        table.add_row(*cells(row))
    console = Console(width=110)
    console.print(table)
    for row in rows:
        if "crash" in row:
            console.print(f"{row['entrant']} on {row['task']}: {row['crash']}", style="red")


def main() -> None:
    arguments = parse_arguments("step_cost", __doc__)
    rounds = 2 if arguments.fast else 40
    rows: list[dict[str, Any]] = []
    for optimizer in ["Adam"] if arguments.fast else OPTIMIZERS:
        block: list[dict[str, Any]] = []
        for name, task in TASKS.items():
            task = replace(task, inputs=(4, *task.inputs[1:]), steps=2) if arguments.fast else task
            labels = {"optimizer": optimizer, "task": name, "rounds": rounds}
            block += [labels | row for row in summarize(contest(task, OPTIMIZERS[optimizer], rounds))]
        show(optimizer, block)
        rows += block
    write_json(arguments.output, "step_cost", rows)


if __name__ == "__main__":
    main()
