"""The k-th smallest magnitude of many weights: `kth_smallest`, what others do, and one plain read.

    python benchmarks/threshold.py [--sizes 25e6 200e6] [--repeats 5] [--output FILE] [--fast]

All methods run in turn within each repeat, so that a busy machine slows them alike; times are medians.
"""

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_structopt.pruning import kth_smallest

SHARE = 0.9
TENSORS = 10
SLOW = {"cat + topk": 50_000_000}  # above this size once only, as it takes half a minute


def read(tensors: Sequence[Tensor], k: int) -> None:
    sum(t.abs().sum() for t in tensors)


def ours(tensors: Sequence[Tensor], k: int) -> Tensor:
    return kth_smallest(tensors, k, absolute=True)


def kthvalue(tensors: Sequence[Tensor], k: int) -> Tensor:
    return torch.cat([t.view(-1) for t in tensors]).abs_().kthvalue(k).values


def topk(tensors: Sequence[Tensor], k: int) -> Tensor:
    """As `torch.nn.utils.prune.global_unstructured` does."""
    return torch.topk(torch.cat([t.view(-1) for t in tensors]).abs_(), k, largest=False).values[-1]


METHODS: dict[str, Callable[[Sequence[Tensor], int], Tensor | None]] = {
    "read: sum of abs().sum()": read,
    "kth_smallest": ours,
    "cat + kthvalue": kthvalue,
    "cat + topk": topk,
}


def weights(size: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.empty(size // TENSORS).normal_() for _ in range(TENSORS)]


def peak_memory() -> int:
    """Return the most bytes this process has held; `ru_maxrss` would start from its parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def extra_memory(size: int) -> float:
    """Return the peak of extra memory as a share of the weights; in a process of its own."""
    tensors = weights(size)
    ours([torch.ones(9)], 9)  # loads code
    before = peak_memory()
    ours(tensors, round(SHARE * size))
    return (peak_memory() - before) / sum(t.nbytes for t in tensors)


def measure(size: int, repeats: int) -> dict[str, Any]:
    tensors, k = weights(size), round(SHARE * size)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for repeat in range(repeats + 1):
        found = set()
        for name, method in METHODS.items():
            if repeat > 0 and size > SLOW.get(name, size):
                continue
            start = time.perf_counter()
            answer = method(tensors, k)
            seconds[name].append(time.perf_counter() - start)
            found |= set() if answer is None else {float(answer)}
        assert len(found) == 1, f"The methods disagree: {found}."
    timed = {name: runs[1:] or runs for name, runs in seconds.items()}  # the first run warms up
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        memory = pool.submit(extra_memory, size).result()
    return {"size": size, "k": k, "extra_memory": memory, "seconds": timed}


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['size']:,} weights in {TENSORS} tensors, k = {result['k']:,}")
    for column in ("method", "median s", "best s", "x read", "runs"):
        table.add_column(column, justify="left" if column == "method" else "right")
    reading = statistics.median(result["seconds"]["read: sum of abs().sum()"])
    for name, runs in result["seconds"].items():
        median = statistics.median(runs)
        table.add_row(name, f"{median:.4f}", f"{min(runs):.4f}", f"{median / reading:.2f}", str(len(runs)))
    Console().print(table, f"extra memory of kth_smallest: {result['extra_memory']:.1%} of the weights")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[25e6, 200e6])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file; by default benchmarks/results/threshold.json")
    parser.add_argument("--fast", action="store_true", help="tiny sizes; writes only where it is told to")
    arguments = parser.parse_args()
    results = []
    for size in [30_000, 300_000] if arguments.fast else map(int, arguments.sizes):
        results.append(measure(size, arguments.repeats))
        show(results[-1])
    default = None if arguments.fast else RESULTS / "threshold.json"
    write_json(arguments.output or default, "threshold", results)


if __name__ == "__main__":
    main()
