"""Kill at random, go on, and compare with the run that nobody disturbed: weights must be equal, bit for bit.

    python benchmarks/endurance.py [--kills 100] [--seed 0] [--fast]

Short trainings of each kind are killed by SIGKILL at random moments, with all processes that they started, and started
again until they come to an end. After each kill every checkpoint, teacher cache and sweep storage is read.
"""

import os
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from common import Batches, parse_arguments, quiet_trainer, write_as_they_come
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_structopt as so
from lightning_structopt.distillation.cache.fingerprint import fingerprint
from lightning_structopt.sweep.storage import opened

FEATURES, CLASSES, SAMPLES, BATCH = 12, 4, 96, 6
EPOCHS = 10


class Classifier(pl.LightningModule):
    """A LightningModule as any user would write it."""

    def __init__(self, hidden: int = 16, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Linear(FEATURES, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self(inputs), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_acc", (self(inputs).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-1)


def samples() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(0))
    return inputs, inputs[:, :CLASSES].argmax(1)


def trained(folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None) -> None:
    """Train, or go on from the last checkpoint, and write what came out."""
    warnings.filterwarnings("ignore", ".*(Checkpoint directory|Be aware that when using `ckpt_path`).*")
    last = folder / "last.ckpt"
    saved = ModelCheckpoint(folder, save_last=True)
    run = quiet_trainer(max_epochs=EPOCHS, callbacks=[*callbacks, saved], enable_checkpointing=True)
    loader = Batches(*samples(), BATCH) if data is None else data
    run.fit(module, loader, ckpt_path=last if last.exists() else None)
    finish(folder, module.state_dict())


def finish(folder: Path, result: Any) -> None:
    torch.save(result, folder / "result.part")
    (folder / "result.part").rename(folder / "result.pt")


def distilled(folder: Path) -> None:
    loader = DataLoader(so.WithIds(TensorDataset(*samples())), BATCH)
    module = so.DistillationModule(
        Classifier(32, seed=5), Classifier(), cache=so.TeacherCache(folder / "cache")
    )
    trained(folder, module, data=loader)


def swept(folder: Path, executor: Callable[[], Any]) -> None:
    loader = DataLoader(TensorDataset(*samples()), BATCH, shuffle=True)
    result = so.ArchitectureSweep(
        candidates={f"width {width}": partial(Classifier, width) for width in (4, 8, 16)},
        monitor="val_acc",
        budget=so.FixedRounds(rounds=2, epochs=2, keep=2),
        trainer={"accelerator": "cpu", "devices": 1},
        executor=executor(),
        directory=folder / "sweep",
        progress=False,
    ).run(loader, loader)
    scores = {candidate.name: [candidate.epochs, candidate.score] for candidate in result.candidates}
    finish(folder, {"scores": scores, "best": result.best.load().state_dict()})


JOBS: dict[str, Callable[[Path], None]] = {
    "pruning": lambda folder: trained(
        folder,
        Classifier(),
        so.IterativePruning(0.8, criterion=so.Taylor(), interval="step", every=3, verbose=False),
        so.LRDecay(so.Cosine()),
        EMAWeightAveraging(decay=0.9),
    ),
    "lottery tickets": lambda folder: trained(
        folder,
        Classifier(),
        so.IterativePruning(0.8, end=0.9, rewind=so.RewindWeights(to=0.05), verbose=False),
        so.LRDecay(so.Linear()),
    ),
    "distillation with a cache": distilled,
    "removing channels": lambda folder: trained(
        folder,
        Classifier(),
        so.ChannelPruning(so.FLOPs(0.5), interval="step", every=3, end=0.5, remove="now", verbose=False),
        so.LRDecay(so.Linear()),
    ),
    "growth": lambda folder: trained(
        folder, Classifier(), so.NetworkGrowth([2, 4], widen=so.Widen(1.5), verbose=False)
    ),
    "sweep": partial(swept, executor=so.InProcess),
    "sweep in processes": partial(swept, executor=lambda: so.LocalProcesses(workers=2)),
}
IN_PROCESSES = "sweep in processes"


def started(job: Callable[[Path], None], folder: Path) -> int:
    """Start ``job`` in a process of its own, the leader of a group; it need not import anything again."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setsid()
        with (folder / "output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        job(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process: int, seconds: float) -> bool:
    """Wait for a process to end, for some seconds, and tell whether it did."""
    deadline = time.monotonic() + seconds
    while True:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)


def require_success(process: int, name: str, folder: Path) -> None:
    if status := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
        raise RuntimeError(f"`{name}` ended with status {status}:\n{(folder / 'output.txt').read_text()}")


def require_readable(folder: Path) -> int:
    """Read all that a kill has left under its own name, and return how many files that are."""
    checkpoints = list(folder.rglob("*.ckpt"))
    for path in checkpoints:
        torch.load(path, weights_only=True)
    if (folder / "cache").exists():
        so.TeacherCache(folder / "cache").open(fingerprint(Classifier(32, seed=5)))
    if (journal := folder / "sweep" / "journal.log").exists():
        with opened(f"journal:{journal}") as storage:
            storage.get_all_studies()
    return len(checkpoints)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return bool(one == other)


@dataclass
class Endured:
    """What one kind of training went through."""

    name: str
    seconds: float
    kills: int = 0
    runs: int = 0
    checkpoints_read: int = 0


def endure(name: str, kills: int, chance: random.Random, root: Path) -> Endured:
    """Kill runs of ``name`` until there were so many kills; the last one is let go on to its end.

    Raises:
        RuntimeError: If one fails, leaves something unreadable, or comes to another result.
    """
    job = JOBS[name]
    if name != IN_PROCESSES:  # so that what is imported late is there when processes are forked
        (root / "first").mkdir(parents=True)
        job(root / "first")
    undisturbed = root / "undisturbed"
    undisturbed.mkdir(parents=True)
    begun = time.monotonic()
    require_success(started(job, undisturbed), name, undisturbed)
    found = Endured(name, round(time.monotonic() - begun, 2))
    expected = torch.load(undisturbed / "result.pt", weights_only=True)
    while found.kills < kills:
        folder = root / f"run-{found.runs}"
        folder.mkdir()
        while not (folder / "result.pt").exists():
            process = started(job, folder)
            moment = chance.uniform(0, 1.5 * found.seconds) if found.kills < kills else float("inf")
            if ended(process, moment):
                require_success(process, name, folder)
                continue
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            found.kills += 1
            found.checkpoints_read += require_readable(folder)
        if not equal(torch.load(folder / "result.pt", weights_only=True), expected):
            raise RuntimeError(f"`{name}` came to another result after kills. See {folder}.")
        found.runs += 1
        shutil.rmtree(folder)
    return found


def rows(names: list[str], kills: int, seed: int, root: Path) -> Iterator[dict[str, Any]]:
    for index, name in enumerate(names):
        share = kills * (index + 1) // len(names) - kills * index // len(names)
        yield vars(endure(name, share, random.Random(f"{seed}, {name}"), root / str(index)))


def main() -> None:
    arguments = parse_arguments("endurance", __doc__, kills=100, seed=0)
    torch.set_num_threads(1)  # as processes are forked, which threads do not survive
    warnings.filterwarnings("ignore")  # Lightning's advice, once for each run
    names = [name for name in JOBS if name != IN_PROCESSES] if arguments.fast else list(JOBS)
    kills = 2 * len(names) if arguments.fast else arguments.kills
    root = Path(tempfile.mkdtemp(prefix="endurance-"))
    found = write_as_they_come(arguments.output, "endurance", rows(names, kills, arguments.seed, root))
    table = Table("training", "seconds", "kills", "runs", "checkpoints read", title="Killed, resumed, equal")
    for row in found:
        seconds, *counts = (row[key] for key in ("seconds", "kills", "runs", "checkpoints_read"))
        table.add_row(row["name"], f"{seconds:.1f}", *map(str, counts))
    Console().print(table)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
