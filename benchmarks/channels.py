"""Half the channels, half the operations: how much faster it really gets, and what is left of the accuracy.

    python benchmarks/channels.py                  # latency of four networks, before and after
    python benchmarks/channels.py --part quality   # Fashion-MNIST, a small ResNet, half its operations
    python benchmarks/channels.py --part time      # what it takes to make a network smaller

Torch-Pruning's group pruner runs beside ours where it is installed (`pip install torch-pruning`).
"""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from statistics import mean, median, stdev
from typing import Any, TypeVar

import torch
from accuracy import BATCH_SIZE, NETWORKS, Trained
from common import Batches, images, parse_arguments, quiet_trainer, top1, write_as_they_come
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from zoo import load

from lightning_structopt.profiling.latency import latency
from lightning_structopt.shrinking import ChannelPruning, ChannelRatio, FLOPs, channel_report, prune_channels

Module = TypeVar("Module", bound=nn.Module)
KEEP = 0.5
TIMED = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v2",
    "timm:vit_base_patch16_224",
)
SHRUNK = ("torchvision:resnet50", "torchvision:densenet121")
IMAGE = torch.zeros(2, 1, 28, 28)


def timings(fast: bool, seeds: int) -> Iterator[dict[str, Any]]:
    """Time networks with all and with half of their channels; `seeds` plays no part."""
    for spec in TIMED[:1] if fast else TIMED:
        module, inputs = load(spec)
        report = channel_report(module, ChannelRatio(KEEP), inputs, same_class=True)
        for batch_size in (1,) if fast else (1, 8):
            seconds = 0.2 if fast else 5.0
            before, after = (
                latency(each, inputs, batch_size=batch_size, seconds=seconds)
                for each in (module, report.module)
            )
            theoretical = report.flops[0] / report.flops[1]
            realized = before.median_ms / after.median_ms
            yield {
                "model": spec,
                "batch": batch_size,
                "parameters": report.parameters[1] / report.parameters[0],
                "flops": report.flops[1] / report.flops[0],
                "before (ms)": before.median_ms,
                "after (ms)": after.median_ms,
                "speedup": realized,
                "of the theoretical": realized / theoretical,
            }


def durations(fast: bool, seeds: int) -> Iterator[dict[str, Any]]:
    """Time how long it takes to remove half of all channels, in turn; `seeds` is the number of rounds.

    Ours also compares outputs with those of the masked network, in evaluation and training.
    """
    for spec in SHRUNK[:1] if fast else SHRUNK:
        module, inputs = load(spec)
        ways: dict[str, Callable[[], Any]] = {
            "ours": partial(prune_channels, module, ChannelRatio(KEEP), inputs)
        }
        if find_spec("torch_pruning") is not None:
            ways["Torch-Pruning"] = partial(torch_pruned, module, KEEP, inputs[0][:1])
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(seeds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        yield {"model": spec, **{f"{name} (s)": median(each) for name, each in seconds.items()}}


@torch.no_grad()
def operations(module: nn.Module) -> int:
    """Return the floating-point operations of one image or two."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(module).eval()(IMAGE)
    return int(counter.get_total_flops())


def fit(module: Trained, data: tuple[Tensor, ...], epochs: int, seed: int, *callbacks: Any) -> Trained:
    quiet_trainer(max_epochs=epochs, callbacks=list(callbacks)).fit(
        module.train(), Batches(data[0], data[1], BATCH_SIZE, seed=seed)
    )
    return module


def in_two_parts(
    shrink: Callable[[Trained], Trained],
    before: float,
    module: Trained,
    data: tuple[Tensor, ...],
    seed: int,
) -> Trained:
    """Train for a part of the epochs, make smaller, train for the rest."""
    epochs = module.network.epochs
    first = round(before * epochs)
    if first:
        fit(module, data, first, seed)
    return fit(shrink(module), data, epochs - first, seed + 100)


def dense(module: Trained, data: tuple[Tensor, ...], seed: int) -> Trained:
    return fit(module, data, module.network.epochs, seed)


def ours(module: Trained, data: tuple[Tensor, ...], seed: int, **options: Any) -> Trained:
    given = {"begin": 0.1, "end": 0.6, "interval": "step", "every": 20, "remove": "now", "verbose": False}
    pruning = ChannelPruning(FLOPs(KEEP), example_input=IMAGE, **{**given, **options})
    return fit(module, data, module.network.epochs, seed, pruning)


def one_shot(module: Trained) -> Trained:
    return prune_channels(module, FLOPs(KEEP), IMAGE)


def torch_pruning(module: Trained) -> Trained:
    """Prune by the group pruner of Torch-Pruning, at the ratio of channels that leaves half the operations."""
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        small = torch_pruned(module, middle)
        left = operations(small) / operations(module)
        low, high = (middle, high) if left > KEEP else (low, middle)
    return torch_pruned(module, high)


def torch_pruned(module: Module, ratio: float, image: Tensor = IMAGE) -> Module:
    import torch_pruning as tp

    small = copy.deepcopy(module)
    pruner = tp.pruner.BasePruner(
        small,
        image,
        importance=tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[layer for layer in small.modules() if isinstance(layer, nn.Linear)],
    )
    pruner.step()
    return small


CONTENDERS: dict[str, Callable[[Trained, tuple[Tensor, ...], int], Trained]] = {
    "dense": dense,
    "half the operations from the start": partial(in_two_parts, one_shot, 0.0),
    "ChannelPruning": ours,
    "ChannelPruning, global": partial(ours, scope="global"),
    "ChannelPruning, group lasso": partial(ours, lasso=1e-2),
    "prune_channels after half the epochs": partial(in_two_parts, one_shot, 0.5),
    "Torch-Pruning after half the epochs": partial(in_two_parts, torch_pruning, 0.5),
}


def qualities(fast: bool, seeds: int) -> Iterator[dict[str, Any]]:
    """Train each contender for the same number of epochs, with equal initial weights and batches."""
    data = images(fast)
    for name, contender in CONTENDERS.items():
        if "Torch-Pruning" in name and find_spec("torch_pruning") is None:
            continue
        scores, left = [], 1.0
        for seed in range(seeds):
            torch.manual_seed(seed)
            module = Trained(NETWORKS["resnet"])
            whole = operations(module)
            trained = contender(module, data, seed).eval()
            scores.append(top1(trained, data))
            left = operations(trained) / whole
        yield {
            "contender": name,
            "flops": left,
            "top1": scores,
            "mean": mean(scores),
            "std": stdev(scores) if len(scores) > 1 else 0.0,
        }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=130).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "  ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


PARTS = {"latency": timings, "quality": qualities, "time": durations}


def main() -> None:
    arguments = parse_arguments("channels", __doc__, choices={"part": list(PARTS)}, seeds=3)
    rows = PARTS[arguments.part](arguments.fast, 1 if arguments.fast else arguments.seeds)
    show(write_as_they_come(arguments.output, "channels", rows))


if __name__ == "__main__":
    main()
