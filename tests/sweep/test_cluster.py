"""Trials as tasks of a real Ray on this machine."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from candidates_for_sweeps import Hangs, Killed, LeavesAChild, Raises, gone
from support import Classifier, loader
from test_sweep_interrupted import Announces, announced, drive, fifo, wait_gone

from lightning_structopt.sweep import ArchitectureSweep, FixedRounds, RayCluster, SweepResult

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 << 20)
    yield context.address_info["gcs_address"]
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray")


@pytest.fixture(scope="module")
def result(folder: Path, address: str) -> SweepResult:
    candidates: dict[str, Any] = {
        "sound": Classifier,
        "small": lambda: Classifier(hidden=2),
        "killed": Killed,
        "raises": Raises,
        "hangs": Hangs,
        "leaves a child": lambda: LeavesAChild(str(folder / "child"), crash=True),
    }
    return ArchitectureSweep(
        candidates,
        "val_acc",
        budget=FixedRounds(2, 1, keep=2),
        trainer={"accelerator": "cpu"},
        executor=RayCluster(),
        directory=folder / "sweep",
        timeout=12.0,
        progress=False,
    ).run(loader(shuffle=True), loader())


def test_what_trials_come_to(result: SweepResult, folder: Path) -> None:
    finished = {c.name for c in result.candidates if c.state == "finished"}
    assert finished == {"sound", "small"}, str(result)
    assert set(result.best.scores) == {1, 2}
    assert result["killed"].reason == "killed by SIGKILL"
    assert result["raises"].reason == "RuntimeError: the loss exploded"
    assert result["hangs"].reason == "did not end within 12.0 s"
    assert result["leaves a child"].reason == "exited with status 1"
    assert gone(int((folder / "child").read_text())), "what a trial started ends with it"


def test_ranks_train_together(address: str, tmp_path: Path) -> None:
    result = ArchitectureSweep(
        {"two": Classifier},
        "val_acc",
        budget=FixedRounds(1, 1),
        trainer={"strategy": "ddp", "devices": 2, "accelerator": "cpu"},
        executor=RayCluster(address),
        directory=tmp_path / "sweep",
        progress=False,
    ).run(loader(), loader())
    assert result.best.epochs == 1


def announcing(folder: Path, address: str) -> ArchitectureSweep:
    return ArchitectureSweep(
        {"a": lambda: Announces(4, folder / "pipe", 1)},
        "val_acc",
        budget=FixedRounds(2, 1),
        trainer={"accelerator": "cpu"},
        executor=RayCluster(address),
        directory=folder / "sweep",
        progress=False,
    )


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_driver_that_dies_leaves_no_orphan(with_signal: int, address: str, tmp_path: Path) -> None:
    pipe = fifo(tmp_path / "run")
    arguments = f"Path({str(tmp_path / 'run')!r}), {address!r}"
    driver = drive(tmp_path / "drive.py", "test_cluster", "announcing", arguments, "loader(), loader()")
    trial = announced(pipe)
    os.kill(driver.pid, with_signal)
    assert driver.wait(timeout=60) != 0
    wait_gone(trial)
    pipe.unlink()
    result = announcing(tmp_path / "run", address).run(loader(), loader())
    assert set(result.best.scores) == {1, 2}


def test_a_worker_that_ray_loses(address: str, tmp_path: Path) -> None:
    marker = tmp_path / "killed"

    class LosesItsWorker(Classifier):
        def on_train_epoch_start(self) -> None:
            server = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
            marker.touch()
            os.kill(int(server[1]), signal.SIGKILL)
            signal.pause()

    sweep = ArchitectureSweep(
        {"lost": LosesItsWorker, "sound": Classifier},
        "val_acc",
        budget=FixedRounds(1, 1),
        trainer={"accelerator": "cpu"},
        executor=RayCluster(address),
        directory=tmp_path / "sweep",
        progress=False,
    )
    result = sweep.run(loader(), loader())
    assert marker.exists()
    assert result["lost"].reason.startswith("Ray: WorkerCrashedError: ")
    assert result.best.name == "sound"


def test_more_than_the_cluster_has(address: str, tmp_path: Path) -> None:
    def run(executor: RayCluster, **trainer: Any) -> None:
        ArchitectureSweep(
            {"a": Classifier}, "val_acc", trainer={"accelerator": "cpu", **trainer}, executor=executor,
            directory=tmp_path, progress=False,
        ).run(loader(), loader())  # fmt: skip

    with pytest.raises(ValueError, match=r"Found {'CPU': 3} asked, and {'CPU': 2.0} in the cluster"):
        run(RayCluster(resources={"CPU": 3}))
    with pytest.raises(
        ValueError, match=r"Found `devices=2` and `resources = None`. Give `resources={'GPU': 2"
    ):
        run(RayCluster(), accelerator="gpu", devices=2)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="`resources` must be numbers by name. Found `CPU = '2'`"):
        RayCluster(resources={"CPU": "2"})
    with pytest.raises(ValueError, match="`resources` must be above 0. Found `GPU = 0`"):
        RayCluster(resources={"GPU": 0})
    with pytest.raises(ValueError, match="Found `address = 'ray://head:10001'`, Ray's client"):
        RayCluster("ray://head:10001")


def test_ray_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"`RayCluster` needs .* `pip install lightning-structopt\[ray\]`"
    ):
        ArchitectureSweep({"a": Classifier}, "val_acc", executor=RayCluster(), directory=tmp_path)
