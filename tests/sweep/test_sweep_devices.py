"""Trials on several devices, and sweeps that ask for what isn't there."""

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from support import Classifier, loader
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_structopt.sweep import ArchitectureSweep, FixedRounds, InProcess, LocalProcesses, SweepResult
from lightning_structopt.sweep.devices import count_devices, gpus_of_slot
from lightning_structopt.sweep.processes import trial_environment

TWO = {"strategy": "ddp", "devices": 2, "accelerator": "cpu"}


class RankDies(Classifier):
    """Its second rank is killed while the first waits for it."""

    def on_train_epoch_start(self) -> None:
        if self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class WritesRanks(Classifier):
    def __init__(self, folder: str, hidden: int = 16) -> None:
        super().__init__(hidden=hidden)
        self.folder = folder
        self.net[1] = nn.Dropout(0.3)

    def on_train_epoch_start(self) -> None:
        where = Path(self.folder) / f"{self.current_epoch}-{self.global_rank}-of-{self.trainer.world_size}"
        where.write_text(os.environ["MASTER_PORT"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ddp")


@pytest.fixture(scope="module")
def result(folder: Path) -> SweepResult:
    for name in ("rungs", "straight"):
        (folder / name).mkdir()
    return sweep(folder / "sweep", FixedRounds(rounds=2, epochs=1, keep=1), folder / "rungs", faults=True)


def sweep(directory: Path, budget: Any, ranks: Path, faults: bool) -> SweepResult:
    sound = {"two": functools.partial(WritesRanks, str(ranks))}
    bad = {"dies": RankDies}
    return ArchitectureSweep(
        {**sound, **(bad if faults else {})},
        "val_acc",
        budget=budget,
        trainer=TWO,
        directory=directory,
        timeout=120.0,
        progress=False,
    ).run(loader(shuffle=True), loader())


def test_ranks_train_together(result: SweepResult, folder: Path) -> None:
    ranks = {path.name for path in (folder / "rungs").iterdir()}
    assert ranks == {f"{epoch}-{rank}-of-2" for epoch in (0, 1) for rank in (0, 1)}
    assert result.best.name == "two"
    assert set(result.best.scores) == {1, 2}
    assert isinstance(result.best.load(), WritesRanks)


def test_two_rungs_equal_straight_training_on_two_ranks(result: SweepResult, folder: Path) -> None:
    straight = sweep(folder / "other", FixedRounds(rounds=1, epochs=2), folder / "straight", faults=False)
    weights, expected = result.best.load().state_dict(), straight.best.load().state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert result.best.curve == straight.best.curve


def test_a_rank_that_dies_ends_its_trial_alone(result: SweepResult) -> None:
    assert result["dies"].state == "failed"
    assert result["dies"].reason  # whether the launcher or a collective notices first


def test_more_devices_than_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(trainer: dict, executor: Any = None) -> ArchitectureSweep:
        return ArchitectureSweep(
            {"a": Classifier}, "val_acc", trainer=trainer, executor=executor, directory=tmp_path
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="Found `accelerator='gpu'` and no GPU"):
        of({"accelerator": "gpu"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="Found `strategy='ddp_spawn'`. Take 'ddp'"):
        of({"accelerator": "cpu", "devices": 2, "strategy": "ddp_spawn"})
    of({"accelerator": "gpu", "devices": 2}, LocalProcesses(workers=2))
    with pytest.raises(ValueError, match="Found 2 workers of 3 GPUs each, and 4 GPUs"):
        of({"accelerator": "gpu", "devices": 3}, LocalProcesses(workers=2))
    with pytest.raises(ValueError, match="`InProcess` runs trials on one device. Found 2"):
        of(TWO, InProcess())
    with pytest.raises(ValueError, match="`InProcess` can't end a trial that hangs. Found `timeout = 3"):
        ArchitectureSweep(
            {"a": Classifier}, "a", executor=InProcess(), timeout=3, trainer={"accelerator": "cpu"}
        )


@pytest.mark.parametrize(
    ("devices", "expected"), [("auto", 2), (-1, 2), ("-1", 2), (1, 1), ("3", 3), ([0, 2], 2), ("0,2,3", 3)]
)
def test_count_devices(devices: Any, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert count_devices({"devices": devices}, workers=2) == expected


def test_slots_share_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpus_of_slot(slot, 2, {}) for slot in range(2)] == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-x,7")
    assert [gpus_of_slot(slot, 3, {}) for slot in range(3)] == ["4", "5", "GPU-x"]
    assert gpus_of_slot(0, 2, {"accelerator": "cpu"}) is None


def test_what_a_launcher_said_to_the_driver_does_not_reach_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "PL_GLOBAL_SEED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "training")
    found = trial_environment(0, 1, 3, {"accelerator": "cpu"})
    assert not found.keys() & {"LOCAL_RANK", "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "PL_GLOBAL_SEED"}
    assert int(found["MASTER_PORT"]) > 1023
    assert found["SLURM_JOB_NAME"] == "bash"
    assert found["OMP_NUM_THREADS"] == "3"


class Sharded(Classifier):
    def configure_model(self) -> None:
        mesh = getattr(self, "device_mesh", None)
        if mesh is not None:
            fully_shard(self.net[0], mesh=mesh["data_parallel"])
            fully_shard(self.net, mesh=mesh["data_parallel"])


def test_sharded_models(tmp_path: Path) -> None:
    result = ArchitectureSweep(
        {"sharded": Sharded},
        "val_acc",
        budget=FixedRounds(rounds=2, epochs=1),
        trainer={"strategy": ModelParallelStrategy(), "devices": 2, "accelerator": "cpu"},
        directory=tmp_path / "sweep",
        progress=False,
    ).run(loader(), loader())
    assert set(result.best.scores) == {1, 2}
    assert result.best.checkpoint.is_dir()
    weights = result.best.load().state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert result.best.costs["parameters"] == sum(p.numel() for p in Classifier().parameters())
