"""What ensembles gain and cost, on Fashion-MNIST (`--fast`: scikit-learn's digits).

    python benchmarks/ensembles.py [--part quality|cascade|stacked] [--seeds 3] [--members 5] [--fast]

Quality: members that differ in their seeds, all of them together, chosen greedily, a cascade with a tiny network before
them that is calibrated on held-out data to be as accurate, and one network that learned from them (for twice the
epochs; beside it one that trained as long by itself). Snapshots of one run of as many epochs as all members together.
Where torchensemble is installed, its voting on the same members, and its own snapshots. Milliseconds are for all test
images, in batches of 256. Cascade: what may come before the ensemble, each calibrated to be as accurate on held-out
data: a tiny network, one of the members, one that learned from them, and two of these. Stacked: 8 members one by one
and as one vectorized pass; and ensembles of them with `stack=False` and `stack="auto"`, which also put together what
members say.
"""

import logging
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from statistics import mean, median, stdev
from time import perf_counter
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, images, parse_arguments, quiet_trainer, top1, write_as_they_come
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_structopt as so
from lightning_structopt.ensembles import (
    ParallelEnsemble,
    SerialEnsemble,
    SnapshotEnsemble,
    TemperatureScaling,
    predictions,
    select_greedily,
)
from lightning_structopt.ensembles.stacked import AllAtOnce, OneByOne
from lightning_structopt.profiling import latency

BATCH_SIZE, EPOCHS, HELD_OUT = 128, 4, 5000


class SmallCNN(pl.LightningModule):
    """Two convolutions and a linear layer, as any user would write it."""

    def __init__(self, width: int = 12, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(2 * width * 49, 10),
        )  # fmt: skip

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net(pictures)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pictures, labels = batch
        return nn.functional.cross_entropy(self(pictures), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def train(
    module: pl.LightningModule, data: tuple[Tensor, ...], seed: int, epochs: int, *callbacks: pl.Callback
) -> None:
    schedule = callbacks or (so.LRDecay(so.Cosine(minimum=0.02)),)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=list(schedule))
    trainer.fit(module, Batches(data[0], data[1], BATCH_SIZE, seed=seed))
    module.eval()


def made(seed: int, width: int = 12) -> SmallCNN:
    torch.manual_seed(seed)
    return SmallCNN(width)


@torch.no_grad()
def milliseconds(module: nn.Module, pictures: Tensor, rounds: int) -> float:
    """Return the time for all pictures, in batches of 256."""
    found = []
    for _ in range(rounds + 1):
        start = perf_counter()
        for part in pictures.split(256):
            module(part)
        found.append(1000 * (perf_counter() - start))
    return median(found[1:])


def quality(seeds: int, count: int, fast: bool) -> Iterator[dict[str, Any]]:
    train_x, train_y, test_x, test_y = images(fast)
    held = 200 if fast else HELD_OUT
    data = (train_x[:-held], train_y[:-held], test_x, test_y)
    held_out = Batches(train_x[-held:], train_y[-held:], 256)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for name, module in contenders(1000 * seed, count, data, held_out, fast):
            scores = [top1(one, data) for one in (module if isinstance(module, list) else [module])]
            one = module[0] if isinstance(module, list) else module
            took = milliseconds(one, test_x, 1 if fast else 5)
            found.setdefault(name, []).append({"top1": mean(scores), "ms": took})
    base, whole = (mean(run["top1"] for run in found[name]) for name in ("members, mean", "all members"))
    for name, runs in found.items():
        scores = [run["top1"] for run in runs]
        gain = whole - base
        yield {
            "part": "quality",
            "model": name,
            "top1": scores,
            "mean": mean(scores),
            "std": stdev(scores) if len(scores) > 1 else 0.0,
            "gain_kept": (mean(scores) - base) / gain if gain else 0.0,
            "ms": median(run["ms"] for run in runs),
        }


def contenders(
    seed: int, count: int, data: tuple[Tensor, ...], held_out: Batches, fast: bool
) -> Iterator[tuple[str, Any]]:
    epochs = 1 if fast else EPOCHS
    members = [made(seed + index) for index in range(count)]
    for index, member in enumerate(members):
        train(member, data, seed + index, epochs)
    yield "members, mean", members
    everyone = ParallelEnsemble(members, stack=False).eval()
    yield "all members", everyone
    yield "all members, stack=auto", ParallelEnsemble(members).eval()
    choice = select_greedily(members, held_out, log_likelihood)
    yield (
        "chosen greedily",
        ParallelEnsemble([members[i] for i in choice.indices], choice.chosen_weights).eval(),
    )
    tiny = made(seed + 500, width=3)
    train(tiny, data, seed, epochs)
    yield "tiny network", tiny
    yield "cascade", cascade([tiny], everyone, held_out)
    student, alone = made(seed + 600), made(seed + 600)
    train(
        so.DistillationModule(everyone.as_teacher(), student, so.SoftTarget(1.0), 0.9), data, seed, 2 * epochs
    )
    yield "distilled, twice the epochs", student.eval()
    train(alone, data, seed, 2 * epochs)
    yield "alone, twice the epochs", alone
    snapshots = SnapshotEnsemble(count)
    train(made(seed), data, seed, count * epochs, snapshots)
    yield "snapshots of one run", snapshots.ensemble(SmallCNN).eval()
    if find_spec("torchensemble"):
        yield from of_torchensemble(members, seed, data, count * epochs)


def log_likelihood(probabilities: Tensor, labels: Tensor) -> Tensor:
    return -nn.functional.nll_loss(probabilities.clamp_min(1e-9).log(), labels)


def cascade(before: list[nn.Module], everyone: ParallelEnsemble, held_out: Batches) -> SerialEnsemble:
    """Return a cascade that ends with ``everyone``, calibrated to be as accurate on held-out data."""
    found = predictions([everyone], held_out)
    accuracy = float((found.outputs[0].argmax(1) == found.target).double().mean())
    ensemble = SerialEnsemble([*(TemperatureScaling(each).fit(held_out) for each in before), everyone])
    ensemble.calibrate(held_out, target_accuracy=accuracy)
    return ensemble.eval()


def cascades(seeds: int, count: int, fast: bool) -> Iterator[dict[str, Any]]:
    train_x, train_y, test_x, test_y = images(fast)
    held = 200 if fast else HELD_OUT
    data = (train_x[:-held], train_y[:-held], test_x, test_y)
    held_out = Batches(train_x[-held:], train_y[-held:], 256)
    epochs, rounds = (1, 1) if fast else (EPOCHS, 9)
    for seed in range(seeds):
        first = 1000 * seed
        members, tiny, student = (
            [made(first + i) for i in range(count)],
            made(first + 500, 3),
            made(first + 600),
        )
        for module, own in zip([*members, tiny], [*range(first, first + count), first], strict=True):
            train(module, data, own, epochs)
        everyone = ParallelEnsemble(members, stack=False).eval()
        train(
            so.DistillationModule(everyone.as_teacher(), student, so.SoftTarget(1.0), 0.9),
            data,
            first,
            epochs,
        )
        student.eval()
        starts = {
            "all members": None,
            "tiny first": [tiny],
            "a member first": [members[0]],
            "a distilled one first": [student],
            "tiny, then a member": [tiny, members[0]],
            "tiny, then a distilled one": [tiny, student],
        }
        ways = {
            name: everyone if start is None else cascade(start, everyone, held_out)
            for name, start in starts.items()
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):  # in turn, so that all have the same share of a busy machine
            for name, way in ways.items():
                times[name].append(milliseconds(way, test_x, 1))
        base = median(times["all members"])
        for name, way in ways.items():
            yield {
                "part": "cascade",
                "model": f"{name}, seed {seed}",
                "top1": top1(way, data),
                "of_all": median(times[name]) / base,
                "ms": median(times[name]),
                "executed": getattr(way, "executed_fraction", None),
            }


def of_torchensemble(
    members: list[SmallCNN], seed: int, data: tuple[Tensor, ...], epochs: int
) -> Iterator[tuple[str, Any]]:
    from torchensemble import SnapshotEnsembleClassifier, VotingClassifier

    logging.getLogger().setLevel(logging.WARNING)
    voting = VotingClassifier(estimator=SmallCNN, n_estimators=len(members), cuda=False)
    voting.estimators_ = nn.ModuleList(members)
    yield "torchensemble: voting, same members", voting.eval()
    torch.manual_seed(seed)
    snapshots = SnapshotEnsembleClassifier(estimator=SmallCNN, n_estimators=len(members), cuda=False)
    snapshots.set_optimizer("AdamW", lr=3e-3)
    loader = Batches(data[0], data[1], BATCH_SIZE, seed=seed)
    loader.dataset = TensorDataset(data[0], data[1])  # whose labels it looks at
    snapshots.fit(loader, epochs=epochs, log_interval=10**9, save_model=False)
    yield "torchensemble: snapshots of one run", snapshots.eval()


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def narrow() -> nn.Module:
    return nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(8)))


def stacked(fast: bool) -> Iterator[dict[str, Any]]:
    kinds = {
        "perceptron, 784-32-32-10": (perceptron, (1, 28, 28)),
        "8 layers of 16": (narrow, (16,)),
        "small CNN": (lambda: SmallCNN(8), (1, 28, 28)),
    }
    for name, (make, shape) in kinds.items():
        members = [make().eval().requires_grad_(False) for _ in range(8)]
        for size in (32,) if fast else (1, 32, 256):
            inputs = torch.randn(size, *shape)
            seconds = 0.05 if fast else 1.0
            one_by_one = latency(OneByOne(members), inputs, seconds=seconds).median_ms
            at_once = latency(AllAtOnce(members), inputs, seconds=seconds).median_ms
            never = latency(ParallelEnsemble(members, stack=False).eval(), inputs, seconds=seconds).median_ms
            auto = latency(ParallelEnsemble(members).eval(), inputs, seconds=seconds).median_ms
            yield {
                "part": "stacked",
                "model": f"{name}, batch of {size}",
                "one_by_one_ms": one_by_one,
                "at_once_ms": at_once,
                "speedup": one_by_one / at_once,
                "never_ms": never,
                "auto_ms": auto,
            }


def show(rows: list[dict[str, Any]]) -> None:
    columns = {
        "quality": ("mean", "std", "gain_kept", "ms"),
        "cascade": ("top1", "ms", "of_all"),
        "stacked": ("one_by_one_ms", "at_once_ms", "speedup", "never_ms", "auto_ms"),
    }
    for part, names in columns.items():
        if chosen := [row for row in rows if row["part"] == part]:
            table = Table("model", *names, title=f"Ensembles: {part}")
            for row in chosen:
                table.add_row(row["model"], *(f"{row[name]:,.4g}" for name in names))
            Console().print(table)


def main() -> None:
    arguments = parse_arguments(
        "ensembles", __doc__, choices={"part": ["quality", "cascade", "stacked"]}, seeds=3, members=5
    )
    seeds, count = (1, 2) if arguments.fast else (arguments.seeds, arguments.members)
    parts: list[Iterable[dict[str, Any]]] = []
    if arguments.fast or arguments.part == "stacked":
        parts.append(stacked(arguments.fast))
    if arguments.fast or arguments.part == "cascade":
        parts.append(cascades(seeds, count, arguments.fast))
    if arguments.fast or arguments.part == "quality":
        parts.append(quality(seeds, count, arguments.fast))
    show(write_as_they_come(arguments.output, "ensembles", chain(*parts)))


if __name__ == "__main__":
    main()
