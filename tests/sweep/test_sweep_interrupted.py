"""Drivers that are killed, interrupted or doubled; the sweep loses nothing."""

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from candidates_for_sweeps import gone
from support import Classifier, loader

from lightning_structopt.sweep import ArchitectureSweep, FixedRounds, InProcess, LocalProcesses, SweepResult

HERE = Path(__file__).parent
SCRIPT = """
    import signal, sys
    from pathlib import Path
    sys.path[:0] = [{here!r}, {tests!r}]
    from support import loader
    from {module} import {sweep}

    if __name__ == "__main__":
        # A shell without job control lets its background jobs ignore Ctrl-C, and what they start inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        {sweep}({arguments}).run({loaders})
"""


class Announces(Classifier):
    """Tells through a named pipe who and where it is, and hangs, at one epoch, while the pipe is there."""

    def __init__(self, hidden: int, pipe: Path, epoch: int) -> None:
        super().__init__(hidden=hidden)
        self.pipe, self.epoch = pipe, epoch

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.epoch and self.pipe.exists():
            with self.pipe.open("w") as pipe:
                pipe.write(f"{os.getpid()}\n")
            signal.pause()


def make_sweep(directory: Path, pipe: Path, epoch: int) -> ArchitectureSweep:
    return ArchitectureSweep(
        {f"width {w}": (lambda w=w: Announces(w, pipe, epoch)) for w in (2, 4, 8)},
        "val_acc",
        budget=FixedRounds(rounds=2, epochs=2, keep=2),
        trainer={"accelerator": "cpu"},
        executor=LocalProcesses(workers=2),
        directory=directory,
        progress=False,
    )


def fifo(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def drive(script: Path, module: str, sweep: str, arguments: str, loaders: str) -> subprocess.Popen:
    """Start a process that runs the sweep which the function ``sweep`` of a test file returns."""
    text = SCRIPT.format(
        here=str(HERE),
        tests=str(HERE.parent),
        module=module,
        sweep=sweep,
        arguments=arguments,
        loaders=loaders,
    )
    script.write_text(textwrap.dedent(text))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, str(script)], start_new_session=True, **quiet)


def announced(pipe: Path) -> int:
    """Wait for a trial to say that it hangs; its process id."""
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([descriptor], [], [], 120)[0], "no trial came to that epoch"
            text += os.read(descriptor, 100)
        return int(text.split()[0])
    finally:
        os.close(descriptor)


def wait_gone(pid: int) -> None:
    """Wait for the end of a process that is not our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(descriptor, closefd=True):
        assert select.select([descriptor], [], [], 30)[0] or gone(pid)


def columns(result: SweepResult) -> list[tuple]:
    """The table but for what depends on the clock."""
    return [(c.name, c.state, c.scores, c.curve, c.epochs, c.reason) for c in result.candidates]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    folder = tmp_path_factory.mktemp("undisturbed")
    return make_sweep(folder / "sweep", folder / "pipe", 0).run(loader(shuffle=True), loader())


@pytest.mark.parametrize(("epoch", "with_signal"), [(1, signal.SIGINT), (3, signal.SIGKILL)])
def test_a_driver_that_dies_leaves_no_orphan_and_loses_nothing(
    epoch: int, with_signal: int, undisturbed: SweepResult, tmp_path: Path
) -> None:
    pipe = fifo(tmp_path / "run")
    folder = tmp_path / "run"
    arguments = f"Path({str(folder / 'sweep')!r}), Path({str(pipe)!r}), {epoch}"
    loaders = "loader(shuffle=True, generator=None), loader()"
    driver = drive(folder / "drive.py", "test_sweep_interrupted", "make_sweep", arguments, loaders)
    trial = announced(pipe)
    with pytest.raises(ValueError, match=f"One process may run .* Found that process {driver.pid} does"):
        make_sweep(tmp_path / "run" / "sweep", pipe, epoch).run(loader(), loader())
    os.kill(driver.pid, with_signal)
    driver.wait(timeout=60)
    wait_gone(trial)
    assert driver.returncode != 0
    pipe.unlink()
    # Half-written files of trials that nobody has heard the end of.
    torn = tmp_path / "run/sweep/trials/002-width_8/seed-0/epoch-2.part"
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"torn")
    result = make_sweep(tmp_path / "run" / "sweep", pipe, epoch).run(loader(shuffle=True), loader())
    assert columns(result) == columns(undisturbed)
    assert not torn.exists()
    kept = {path for path in (tmp_path / "run" / "sweep").rglob("*.ckpt")}
    assert kept == {c.checkpoint for c in result.candidates if c.checkpoint}
    assert len(kept) == 2


def sweep_of(folder: Path, **arguments: object) -> ArchitectureSweep:
    defaults: dict = {
        "candidates": {"a": Classifier, "b": lambda: Classifier(hidden=4)},
        "monitor": "val_acc",
        "budget": FixedRounds(1, 1),
        "trainer": {"accelerator": "cpu"},
        "executor": InProcess(),
        "directory": folder / "sweep",
        "progress": False,
    }
    return ArchitectureSweep(**(defaults | arguments))


CHANGES = {
    "candidate 'b' has changed": {"candidates": {"a": Classifier, "b": lambda: Classifier(hidden=5)}},
    "candidate 'c' is new": {"candidates": {"a": Classifier, "b": lambda: Classifier(hidden=4), "c": Classifier}},
    "candidate 'b' is missing": {"candidates": {"a": Classifier}},
    "the candidates are in another order": {"candidates": {"b": lambda: Classifier(hidden=4), "a": Classifier}},
    "`monitor` was 'val_acc', now 'train_loss'": {"monitor": "train_loss"},
    "`mode` was 'max', now 'min'": {"mode": "min"},
    "`seed` was 0, now 1": {"seed": 1},
    r"`budget` was 'FixedRounds\(rounds=1, epochs=1, keep=0.5\)', now": {"budget": FixedRounds(1, 2)},
}  # fmt: skip


def test_a_changed_sweep_is_refused_by_what_changed(tmp_path: Path) -> None:
    before = columns(sweep_of(tmp_path).run(loader(), loader()))
    for message, change in CHANGES.items():
        with pytest.raises(ValueError, match=message):
            sweep_of(tmp_path, **change).run(loader(), loader())
    assert columns(sweep_of(tmp_path).run(loader(), loader())) == before


def test_a_directory_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"must be new, empty, or of this sweep. Found .* with 'thesis.txt' in it"
    ):
        sweep_of(tmp_path).run(loader(), loader())
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["thesis.txt"]


def test_a_database_holds_the_state_too(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/state.db"
    result = sweep_of(tmp_path, storage=storage).run(loader(), loader())
    assert not (tmp_path / "sweep" / "journal.log").exists()
    assert sweep_of(tmp_path, storage=storage).run(loader(), loader()) == result
