"""The process that forks trials is killed: what runs goes on, and what comes next has a new one."""

import os
import signal
from pathlib import Path

import pytest
from candidates_for_sweeps import LeavesAChild, gone
from support import Classifier, loader

from lightning_structopt.sweep import ArchitectureSweep, FixedRounds, LocalProcesses
from lightning_structopt.sweep.forkserver import ForkServer, shared_server

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class KillsItsServer(Classifier):
    """Ends the process that it was forked from, and trains on."""

    def __init__(self, hidden: int, also_itself: bool = False) -> None:
        super().__init__(hidden=hidden)
        self.also_itself = also_itself

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 0:
            os.kill(os.getppid(), signal.SIGKILL)
            if self.also_itself:
                os.kill(os.getpid(), signal.SIGKILL)


class LeavesAHangingChild(LeavesAChild):
    """Kills its server, and hangs beside a child of its own."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()


def test_trials_outlive_it_and_the_next_have_a_new_one(tmp_path: Path) -> None:
    servers: list[ForkServer] = [shared_server()]
    child = tmp_path / "child"
    result = ArchitectureSweep(
        {
            "kills": lambda: KillsItsServer(4),
            "kills both": lambda: KillsItsServer(8, also_itself=True),
            "hangs": lambda: LeavesAHangingChild(str(child), crash=False),
            "sound": Classifier,
        },
        "val_acc",
        budget=FixedRounds(2, 1, keep=4),
        trainer={"accelerator": "cpu"},
        executor=LocalProcesses(workers=1),
        directory=tmp_path / "sweep",
        timeout=8.0,
        progress=False,
    ).run(loader(), loader())
    assert {name: result[name].state for name in ("kills", "sound")} == {
        "kills": "finished",
        "sound": "finished",
    }
    assert set(result["kills"].scores) == {1, 2}
    assert result["kills both"].reason == "killed by SIGKILL"
    assert result["hangs"].reason == "did not end within 8.0 s"
    assert gone(int(child.read_text())), "what a trial started ends with it"
    assert servers[0].gone
    assert not shared_server().gone
