"""Several drivers on one study: each trial is trained once, and what one leaves the others finish."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
import pytest
from candidates_for_sweeps import gone
from optuna.distributions import IntDistribution
from support import Classifier, loader
from test_sweep_interrupted import Announces, announced, columns, drive, fifo, wait_gone

from lightning_structopt.sweep import (
    ArchitectureSweep,
    Executor,
    FixedRounds,
    InProcess,
    LocalProcesses,
    SearchSpace,
    SweepResult,
    peers,
)
from lightning_structopt.sweep.storage import Ledger, opened

WIDTHS = (2, 4, 8)
Both = Callable[[str], list[subprocess.Popen]]


class Meets(Classifier):
    """Writes down every epoch with who trained it; in the first, two wait for each other while the pipe is there."""

    def __init__(self, hidden: int, pipe: Path) -> None:
        super().__init__(hidden=hidden)
        self.pipe = pipe

    def on_train_epoch_start(self) -> None:
        hidden = self.net[0].out_features
        with self.pipe.with_name("log").open("a") as log:
            log.write(f"{hidden} {self.current_epoch} {os.getpid()}\n")
        if self.current_epoch == 0 and hidden <= 4 and self.pipe.exists():
            self.pipe.open("w" if hidden == 2 else "r").close()  # each opens when the other does


class HangsOnce(Announces):
    """One width tells at its third epoch who it is, and hangs, while the pipe is there."""

    def __init__(self, hidden: int, pipe: Path) -> None:
        super().__init__(hidden, pipe, epoch=2 if hidden == 8 else -1)


class Writes(ArchitectureSweep):
    """A sweep whose result goes to a file, for the test to see."""

    def __init__(self, *arguments: Any, table: str, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.file = Path(table)

    def run(self, *data: Any) -> SweepResult:
        result = super().run(*data)
        self.file.write_text(repr(columns(result)))
        return result


def shared(kind: type, executor: Executor, folder: str, storage: str | None, table: str) -> Writes:
    peers.BEAT, peers.GONE = 0.2, 6.0
    pipe = Path(folder) / "pipe"
    return Writes(
        {f"width {w}": (lambda w=w: kind(w, pipe)) for w in WIDTHS},
        "val_acc",
        budget=FixedRounds(rounds=2, epochs=2, keep=2),
        trainer={"accelerator": "cpu"},
        executor=executor,
        directory=Path(folder) / "sweep",
        storage=storage,
        progress=False,
        table=str(Path(folder) / table),
    )


def meeting(*arguments: Any) -> Writes:
    return shared(Meets, InProcess(), *arguments)


def hanging(*arguments: Any) -> Writes:
    return shared(HangsOnce, LocalProcesses(), *arguments)


@pytest.fixture
def both(tmp_path: Path, storage: str) -> Iterator[Both]:
    """Starts two drivers of a sweep that a function here returns."""
    drivers: list[subprocess.Popen] = []

    def start(sweep: str) -> list[subprocess.Popen]:
        for table in ("one", "other"):
            arguments = f"{str(tmp_path)!r}, {storage!r}, {table!r}"
            script = tmp_path / f"{table}.py"
            drivers.append(drive(script, "test_sweep_shared", sweep, arguments, "loader(), loader()"))
        return drivers

    yield start
    for driver in drivers:
        driver.kill()
        driver.wait()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("alone")
    return columns(meeting(str(folder), None, "alone").run(loader(), loader()))


def test_two_drivers_train_each_trial_once(both: Both, undisturbed: list[tuple], tmp_path: Path) -> None:
    fifo(tmp_path)
    drivers = both("meeting")
    assert [driver.wait(timeout=200) for driver in drivers] == [0, 0]
    for table in ("one", "other"):
        assert (tmp_path / table).read_text() == repr(undisturbed)
    lines = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
    epochs = [line[:2] for line in lines]
    survivors = sum(row[4] == 4 for row in undisturbed)
    assert len(epochs) == len(set(epochs)) == 2 * len(WIDTHS) + 2 * survivors
    assert len({line[2] for line in lines}) == 2, "both had a part in it"
    assert len(list(tmp_path.rglob("*.ckpt"))) == survivors


def test_one_is_killed_and_the_other_finishes(both: Both, undisturbed: list[tuple], tmp_path: Path) -> None:
    pipe = fifo(tmp_path)
    drivers = both("hanging")
    trial = announced(pipe)
    of_trial = parent(parent(trial))  # between them is the process that forks trials
    killed = next(driver for driver in drivers if driver.pid == of_trial)
    (left,) = set(drivers) - {killed}
    pipe.unlink()
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    wait_gone(trial)
    assert left.wait(timeout=200) == 0
    tables = [tmp_path / table for table in ("one", "other")]
    assert [table.read_text() for table in tables if table.exists()] == [repr(undisturbed)]
    assert gone(trial)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


SAMPLERS = {
    "random": lambda: optuna.samplers.RandomSampler(seed=3),
    "grid": lambda: optuna.samplers.GridSampler({"hidden": list(range(2, 9))}, seed=3),
}


def draw(path: Path, sampler: str, turns: list[int]) -> list[int]:
    """Return what drivers draw who begin candidates in these turns, each with a sampler of its own."""
    drawn = []
    with ExitStack() as stack:
        drivers = {}
        for number in sorted(set(turns)):
            space = SearchSpace(Classifier, {"hidden": IntDistribution(2, 8)}, 7, SAMPLERS[sampler]())
            storage = stack.enter_context(opened(f"journal:{path}"))
            drivers[number] = Ledger(storage, "draws", "max", space.sampler, shared=True), space
        for index, number in enumerate(turns):
            ledger, space = drivers[number]
            record = ledger.begin(f"sample {index}", 0, 1, space)
            ledger.finish(record.number, 0.5)
            drawn.append(record.parameters["hidden"])
    return drawn


@pytest.mark.parametrize("turns", [[0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 2, 1, 0, 2]])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_drivers_draw_as_one(sampler: str, turns: list[int], tmp_path: Path) -> None:
    together = draw(tmp_path / "together.log", sampler, turns)
    if sampler == "grid":
        assert sorted(together) == list(range(2, 9))
    else:
        assert together == draw(tmp_path / "alone.log", sampler, [0] * 7)
