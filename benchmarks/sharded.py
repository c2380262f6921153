"""One global pruning decision over FSDP2's shards: time, bytes exchanged, memory per rank.

Two processes share a stack of linear layers. `IterativePruning`'s own decision (scores, exact threshold, masks)
is compared with the plain way, which puts every weight together on each rank and takes `kthvalue`.
"""

import gc
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from common import parse_arguments, write_json
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_structopt.pruning import Magnitude, Unstructured
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.one_shot import advance

RANKS, LAYERS, SPARSITY = 2, 10, 0.9
SIZES = (10**6, 10**7, 10**8)

Decision = Callable[[nn.Module], None]


def sharded_stack(weights: int) -> nn.Module:
    """Return ``LAYERS`` square layers of about ``weights`` weights in all, no rank having held a whole one."""
    width = round((weights / LAYERS) ** 0.5)
    with torch.device("meta"):
        stack = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in stack:
        fully_shard(layer, mesh=mesh)
    stack.to_empty(device="cpu")
    for parameter in stack.parameters():
        parameter.to_local().detach().normal_()
    return stack


def ours(stack: nn.Module) -> None:
    advance(MaskSet(dict(stack.named_parameters())), SPARSITY, Magnitude(), Unstructured())


def gathered(stack: nn.Module) -> None:
    scores = torch.cat([parameter.full_tensor().detach().abs().flatten() for parameter in stack.parameters()])
    threshold = scores.kthvalue(round(SPARSITY * len(scores))).values
    for parameter in stack.parameters():
        weight = parameter.to_local().detach()
        weight.mul_(weight.abs() > threshold)


DECISIONS: dict[str, Decision] = {"IterativePruning's decision": ours, "gather, kthvalue": gathered}


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Count what this rank hands to collectives, through `dist` or through DTensors."""
    sent = [0]
    names = ("all_reduce", "all_gather")
    before = {name: getattr(dist, name) for name in names}
    whole = DTensor.full_tensor

    def counting(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            handed = arguments[0] if name == "all_reduce" else arguments[1]
            sent[0] += handed.nbytes
            return before[name](*arguments, **options)

        return call

    def full_tensor(tensor: DTensor, **options: Any) -> Tensor:
        sent[0] += tensor.to_local().nbytes
        return whole(tensor, **options)

    for name in names:
        setattr(dist, name, counting(name))
    DTensor.full_tensor = full_tensor
    try:
        yield sent
    finally:
        DTensor.full_tensor = whole
        for name, function in before.items():
            setattr(dist, name, function)


def memory(field: str) -> int:
    """Return this process's resident memory now (``VmRSS``) or at its most (``VmHWM``), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, weights: int, repeats: int) -> dict[str, Any]:
    """Return the figures of this rank; every repeat starts from fresh weights."""
    times, peak = [], 0
    for _ in range(repeats):
        stack = sharded_stack(weights)
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
        before = memory("VmRSS")
        dist.barrier()
        start = perf_counter()
        with counted_bytes() as sent:
            DECISIONS[name](stack)
        times.append(perf_counter() - start)
        peak = max(peak, memory("VmHWM") - before)
    total = sum(parameter.numel() for parameter in stack.parameters())
    zeros = torch.tensor([sum(int((p.to_local() == 0).sum()) for p in stack.parameters())])
    dist.all_reduce(zeros)
    return {
        "decision": name,
        "weights": total,
        "zeros": int(zeros) / total,
        "seconds": median(times),
        "sent_bytes": sent[0],
        "peak_over_all_weights": peak / (4 * total),
    }


def work(rank: int, port: int, sizes: tuple[int, ...], repeats: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for weights in sizes:
        for name in DECISIONS:
            measure(name, 10_000, 1)  # loads code
            row = measure(name, weights, repeats)
            if rank == 0:
                results.put(row)
    # Modules in reference cycles hold the group; one that outlives it takes the process down at its exit.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("weights", "decision", "zeros", "seconds", "bytes sent a rank", "extra memory, of all weights")
    table = Table(*columns, title=f"One decision, global {SPARSITY:.0%}, FSDP2 on {RANKS} processes")
    for row in rows:
        numbers = [f"{row['zeros']:.6f}", f"{row['seconds']:.3f}", f"{row['sent_bytes']:,}"]
        table.add_row(
            f"{row['weights']:,}", row["decision"], *numbers, f"{row['peak_over_all_weights']:.2f}x"
        )
    Console(width=120).print(table)


def main() -> None:
    arguments = parse_arguments("sharded", __doc__, repeats=3)
    sizes, repeats = ((10**5,), 1) if arguments.fast else (SIZES, arguments.repeats)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(work, (port, sizes, repeats, results), nprocs=RANKS)
    rows = [results.get() for _ in range(len(sizes) * len(DECISIONS))]
    show(rows)
    write_json(arguments.output, "sharded", rows)


if __name__ == "__main__":
    main()
