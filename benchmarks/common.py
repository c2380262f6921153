"""What the benchmarks share: quiet trainers, data held in memory, where and with what it ran, results."""

import argparse
import json
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import lightning_structopt

RESULTS = Path(__file__).parent / "results"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # where `data` is

from data import load  # noqa: E402


class Batches:
    """A loader over tensors in memory; with ``seed``, each epoch has an order of its own.

    Indexing whole batches is many times faster than collating samples.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, batch_size: int, seed: int | None = None) -> None:
        self.inputs, self.labels, self.batch_size = inputs, labels, batch_size
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.generator is None:
            inputs, labels = (tensor.split(self.batch_size) for tensor in (self.inputs, self.labels))
            yield from zip(inputs, labels, strict=True)
            return
        for chosen in torch.randperm(len(self.inputs), generator=self.generator).split(self.batch_size):
            yield self.inputs[chosen], self.labels[chosen]


def images(fast: bool) -> tuple[Tensor, ...]:
    """Return Fashion-MNIST with the mean and deviation of its training images taken out.

    Fast runs take scikit-learn's digits, drawn larger, as Fashion-MNIST is not on every machine.
    """
    train_x, train_y, test_x, test_y = load("digits" if fast else "fashion-mnist")
    if fast:
        train_x, test_x = (nn.functional.interpolate(pictures, size=28) for pictures in (train_x, test_x))
    shift, scale = train_x.mean(), train_x.std()
    return (train_x - shift) / scale, train_y, (test_x - shift) / scale, test_y


@torch.no_grad()
def top1(forward: Callable[[Tensor], Tensor], data: tuple[Tensor, ...]) -> float:
    """Return the percentage of test images that are classified correctly."""
    _, _, test_x, test_y = data
    outputs = torch.cat([forward(part) for part in test_x.split(1000)])
    return 100 * float((outputs.argmax(1) == test_y).float().mean())


class Classifier(pl.LightningModule):
    """A classifier, as any user would write it.

    Args:
        net: Gives logits.
        make_optimizer: Called with its parameters.
    """

    def __init__(self, net: nn.Module, make_optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net = net
        self.make_optimizer = make_optimizer

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def quiet_trainer(**kwargs: Any) -> pl.Trainer:
    """Return a Trainer on the CPU that neither logs nor saves nor shows anything, but for what is asked for."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for advice in ("does not have many workers", "The number of training batches", "GPU available"):
        warnings.filterwarnings("ignore", message=f".*{advice}.*")
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **kwargs},
    )


def parse_arguments(
    name: str, description: str | None, choices: dict[str, list[str]] | None = None, **numbers: int
) -> argparse.Namespace:
    """Parse ``--fast``, ``--output``, choices and numbers by name; a fast run writes only where it is told to.

    The first of each list of choices is the default. Each choice has a file of its own for its results.
    """
    parser = argparse.ArgumentParser(prog=f"python benchmarks/{name}.py", description=description)
    parser.add_argument("--fast", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, help=f"JSON file; by default benchmarks/results/{name}.json")
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"by default {default}")
    for option, values in (choices or {}).items():
        parser.add_argument(f"--{option}", choices=values, default=values[0])
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.fast:
        chosen = [getattr(arguments, option) for option in choices or {}]
        arguments.output = RESULTS / f"{'_'.join([name, *chosen])}.json"
    return arguments


def environment() -> dict[str, Any]:
    """Return what the figures depend on: the command, versions, machine, threads, load and date."""
    script, *arguments = sys.argv
    if "--output" in arguments:  # where results go is no part of what made them
        del arguments[(at := arguments.index("--output")) : at + 2]
    return {
        "command": " ".join([f"python benchmarks/{Path(script).name}", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_structopt": lightning_structopt.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu_model() -> str:
    """Return the CPU's name, and its family and model numbers where a virtual machine hides the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = f"family {fields.get('cpu family')}, model {fields.get('model')}"
    return f"{fields.get('model name', platform.processor())} ({numbers})"


def write_json(path: Path | None, name: str, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` with their environment to ``path``, if there is one."""
    if path is not None:
        _write(path, name, rows)
        print(f"Written to {path}")


def write_as_they_come(path: Path | None, name: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``rows``; those of a long run that is cut off are in ``path`` up to then."""
    written: list[dict[str, Any]] = []
    for row in rows:
        written.append(row)
        if path is not None:
            _write(path, name, written)
    return written


def _write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": name, "environment": environment(), "rows": rows}
    path.write_text(json.dumps(result, indent=2) + "\n")
