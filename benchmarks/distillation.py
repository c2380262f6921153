"""What distillation costs and what it gains, on Fashion-MNIST (`--fast`: scikit-learn's digits).

    python benchmarks/distillation.py [--part time|accuracy] [--seeds 3] [--rounds 6] [--fast]

Time: whole epochs of one student by itself, with a live teacher, and with the teacher's outputs from a filled cache,
in turn; and the wrapper alone, around a teacher of one parameter. Accuracy: the student by itself and with each loss,
for the same epochs, from the same initial weights and batches; every loss is listed, also one that hurts.
"""

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, images, parse_arguments, quiet_trainer, top1, write_as_they_come
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_structopt as so

BATCH_SIZE, EPOCHS = 128, 5


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(block(inputs, outputs, stride), block(outputs, outputs, 1)[:2])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.relu(self.body(inputs) + self.shortcut(inputs))


class ResNet(pl.LightningModule):
    """Three residual stages of one width each, as any user would write it."""

    def __init__(self, widths: tuple[int, int, int], lr: float = 2e-3) -> None:
        super().__init__()
        first, second, third = widths
        self.lr = lr
        self.stem = block(1, first, 2)
        self.stages = nn.Sequential(
            Residual(first, first, 1), Residual(first, second, 2), Residual(second, third, 2)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(third, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


TEACHER, STUDENT = (64, 96, 224), (12, 24, 44)  # 1,050,000 and 49,000 parameters
LOSSES: dict[str, Callable[[], Any]] = {
    "SoftTarget": lambda: so.SoftTarget(temperature=4.0),
    "DKD": lambda: so.DKD(alpha=1.0, beta=2.0, temperature=4.0),
    "DIST": lambda: so.DIST(),
    "Hint": lambda: {"logits": so.SoftTarget(temperature=4.0), ("stages.1", "stages.1"): (0.1, so.Hint())},
}


def trained(widths: tuple[int, int, int], seed: int, data: tuple[Tensor, ...], epochs: int) -> ResNet:
    torch.manual_seed(seed)
    module = ResNet(widths)
    quiet_trainer(max_epochs=epochs).fit(module, Batches(data[0], data[1], BATCH_SIZE, seed=seed))
    return module


def distilled(
    teacher: ResNet, loss: Callable[[], Any], seed: int, data: tuple[Tensor, ...], epochs: int
) -> ResNet:
    torch.manual_seed(seed)
    student = ResNet(STUDENT)
    module = so.DistillationModule(teacher, student, loss(), alpha=0.5)
    quiet_trainer(max_epochs=epochs).fit(module, Batches(data[0], data[1], BATCH_SIZE, seed=seed))
    return student


def accuracy(seeds: int, fast: bool) -> Iterator[dict[str, Any]]:
    data = images(fast)
    epochs = 1 if fast else EPOCHS
    teacher = trained(TEACHER, 0, data, epochs)
    yield row_of("teacher", teacher, [top1(teacher.eval(), data)])
    contenders: dict[str, Callable[[int], ResNet]] = {
        "student by itself": lambda seed: trained(STUDENT, seed, data, epochs)
    }
    for name in ["SoftTarget"] if fast else LOSSES:
        contenders[name] = partial(distilled, teacher, LOSSES[name], data=data, epochs=epochs)
    for name, train in contenders.items():
        scores = [top1(train(seed).eval(), data) for seed in range(seeds)]
        yield row_of(name, ResNet(STUDENT), scores)


def row_of(name: str, module: ResNet, scores: list[float]) -> dict[str, Any]:
    return {
        "part": "accuracy",
        "model": name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "top1": scores,
        "mean": mean(scores),
        "std": stdev(scores) if len(scores) > 1 else 0.0,
    }


class EpochTimer(Callback):
    def __init__(self) -> None:
        self.start = self.seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = perf_counter() - self.start


class OneParameter(nn.Module):
    """A teacher that costs nothing: it gives every image the same logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.logits = torch.randn(1, 10)

    def forward(self, images: Tensor) -> Tensor:
        return (self.scale * self.logits).expand(len(images), 10)


@dataclass
class Entrant:
    """A module with a Trainer that goes on for an epoch at a time."""

    module: pl.LightningModule
    loader: Any

    def __post_init__(self) -> None:
        self.timer = EpochTimer()
        self.trainer = quiet_trainer(max_epochs=0, callbacks=[self.timer])

    def epoch(self) -> float:
        self.trainer.fit_loop.max_epochs += 1
        self.trainer.fit(self.module, self.loader)
        return self.timer.seconds


class Timed(ResNet):
    """Without a schedule, as its length would change with every epoch that is added."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def times(rounds: int, fast: bool) -> list[dict[str, Any]]:
    train_x, train_y, _, _ = images(fast)
    size = 256 if fast else 5120
    data = TensorDataset(train_x[:size], train_y[:size])
    plain, with_ids = (DataLoader(d, BATCH_SIZE, shuffle=True) for d in (data, so.WithIds(data)))
    teacher = Timed(TEACHER).eval()
    with tempfile.TemporaryDirectory() as directory:
        cache = so.TeacherCache(directory)
        start = perf_counter()
        cache.fill(teacher, with_ids, progress=False)
        filling = perf_counter() - start
        entrants = {
            "student by itself": Entrant(Timed(STUDENT), plain),
            "student by itself, again": Entrant(Timed(STUDENT), plain),
            "wrapper, teacher of one parameter": Entrant(
                so.DistillationModule(OneParameter(), Timed(STUDENT)), plain
            ),
            "live teacher": Entrant(so.DistillationModule(teacher, Timed(STUDENT)), plain),
            "cached teacher": Entrant(so.DistillationModule(teacher, Timed(STUDENT), cache=cache), with_ids),
        }
        for entrant in entrants.values():
            entrant.epoch()  # caches are cold
        order, found = random.Random(0), {name: [] for name in entrants}
        for _ in range(rounds):
            for name in order.sample(list(entrants), len(entrants)):
                found[name].append(entrants[name].epoch())
    base = found["student by itself"]
    saved = median(found["live teacher"]) - median(found["cached teacher"])
    return [
        {
            "part": "time",
            "model": name,
            "epoch_seconds": median(seconds),
            "ratio": median(s / b for s, b in zip(seconds, base, strict=True)),
            **({"fill_seconds": filling, "break_even_epochs": filling / saved} if "cached" in name else {}),
        }
        for name, seconds in found.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    for part, columns in (
        ("time", ("epoch_seconds", "ratio", "fill_seconds", "break_even_epochs")),
        ("accuracy", ("parameters", "mean", "std")),
    ):
        chosen = [row for row in rows if row["part"] == part]
        if chosen:
            table = Table("model", *columns, title=f"Distillation: {part}")
            for row in chosen:
                table.add_row(row["model"], *(f"{row[c]:,.4g}" if c in row else "" for c in columns))
            Console().print(table)


def main() -> None:
    arguments = parse_arguments(
        "distillation", __doc__, choices={"part": ["time", "accuracy"]}, seeds=3, rounds=6
    )
    parts: list[Iterable[dict[str, Any]]] = []
    if arguments.fast or arguments.part == "time":
        parts.append(times(1 if arguments.fast else arguments.rounds, arguments.fast))
    if arguments.fast or arguments.part == "accuracy":
        parts.append(accuracy(1 if arguments.fast else arguments.seeds, arguments.fast))
    show(write_as_they_come(arguments.output, "distillation", chain(*parts)))


if __name__ == "__main__":
    main()
