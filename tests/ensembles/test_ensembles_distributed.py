"""Two processes, by DDP and by FSDP2: ranks agree, and results are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from nets import Regressor, classifiers, numbers
from support import CLASSES, Classifier, adamw, assert_same_state, files_of_ranks, loader, trainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from lightning_structopt.ensembles import (
    GatingNetwork,
    MixedEnsemble,
    ParallelEnsemble,
    SerialEnsemble,
    SnapshotEnsemble,
)
from lightning_structopt.ensembles.serial.module import SerialEnsemble as Serial


def plain() -> list[nn.Module]:
    """Members without batch normalization, which sees other batches on two ranks."""
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        members.append(nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, CLASSES)))
    return members


def ensembles() -> dict[str, Any]:
    torch.manual_seed(0)
    lines = [Regressor(hidden=2, seed=seed) for seed in range(2)]
    return {
        "learned": ParallelEnsemble(classifiers(), "learned"),
        "together": ParallelEnsemble(plain(), "learned", train_members=True),
        "chain": Serial(lines, "chain", task="regression", optimizer=adamw),
        "gate": MixedEnsemble(classifiers(2), GatingNetwork(nn.Linear(12, 2))),
    }


def run_one(root: Path, name: str, module: Any, rank: int | None = None, **kwargs: Any) -> dict[str, Any]:
    """Fit in one process with batches of 8, or in two with every second sample of them."""
    run, data = trainer(root, **kwargs), numbers() if name == "chain" else loader()
    if rank is not None:  # Lightning's own sampler shuffles
        data = DataLoader(data.dataset, 4, sampler=DistributedSampler(data.dataset, 2, rank, shuffle=False))
    run.fit(module, data, data)
    return {"state": module.state_dict(), "logged": dict(run.callback_metrics)}


def ddp(rank: int, root: Path) -> None:
    for name, module in ensembles().items():
        found = run_one(root, name, module, rank, strategy="ddp", devices=2)
        torch.save(found, root / f"{name}-{rank}.pt")
    cascade = SerialEnsemble(classifiers(2), threshold=0.35)
    logged = trainer(root, strategy="ddp", devices=2).validate(cascade, loader(32, 4), verbose=False)[0]
    torch.save(logged, root / f"cascade-{rank}.pt")


class Sharded(Classifier):
    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[3]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class ShardedEnsemble(ParallelEnsemble):
    def configure_model(self) -> None:
        for member in self.members:
            fully_shard(member, mesh=self.device_mesh["data_parallel"])


def fsdp(rank: int, root: Path) -> None:
    def strategy() -> ModelParallelStrategy:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    snapshots = SnapshotEnsemble(2)
    run = trainer(root, snapshots, strategy=strategy(), devices=2)
    module = Sharded(adamw)
    run.fit(module, loader(32, 4))
    whole = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module.state_dict().items()
    }
    torch.save({"snapshots": snapshots.snapshots, "whole": whole}, root / f"snapshots-{rank}.pt")
    ensemble = ShardedEnsemble(plain(), train_members=True)
    found = run_one(root, "sharded", ensemble, rank, strategy=strategy(), devices=2)
    torch.save({"logged": found["logged"]}, root / f"sharded-{rank}.pt")


def both(rank: int, root: Path) -> None:
    ddp(rank, root)
    fsdp(rank, root)


root = files_of_ranks(both)


def load(root: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(root / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("name", ["learned", "together", "chain", "gate"])
def test_two_ranks_are_as_one(root: Path, name: str, tmp_path: Path) -> None:
    zero, one = load(root, name, 0), load(root, name, 1)
    assert_same_state(zero["state"], one["state"])
    expected = run_one(tmp_path, name, ensembles()[name])
    torch.testing.assert_close(dict(zero["state"]), dict(expected["state"]), rtol=1e-3, atol=1e-4)
    validated = {key: value for key, value in expected["logged"].items() if "val_" in key}
    found = {key: zero["logged"][key] for key in validated}
    torch.testing.assert_close(found, validated, rtol=2e-3, atol=2e-4)
    assert found == {key: one["logged"][key] for key in validated}


def test_a_cascade_counts_rows_of_all_ranks(root: Path, tmp_path: Path) -> None:
    cascade = SerialEnsemble(classifiers(2), threshold=0.35)
    expected = trainer(tmp_path).validate(cascade, loader(32, 8), verbose=False)[0]
    assert 0 < expected["1/val_executed_fraction"] < 1
    for rank in (0, 1):
        assert load(root, "cascade", rank) == pytest.approx(expected, rel=1e-4)


def test_snapshots_of_shards_are_whole(root: Path) -> None:
    zero, one = load(root, "snapshots", 0), load(root, "snapshots", 1)
    weights = [name for name in zero["whole"] if "running" not in name and "tracked" not in name]
    for found in (zero, one):
        assert len(found["snapshots"]) == 2
        for name in weights:
            assert torch.equal(found["snapshots"][1][name], found["whole"][name])
    Classifier().load_state_dict(zero["snapshots"][0])


def test_members_in_shards_are_trained(root: Path, tmp_path: Path) -> None:
    zero, one = load(root, "sharded", 0)["logged"], load(root, "sharded", 1)["logged"]
    expected = run_one(tmp_path, "sharded", ParallelEnsemble(plain(), train_members=True))["logged"]
    for name in ("val_loss", "val_accuracy", "0/val_accuracy"):
        assert float(zero[name]) == float(one[name])
        assert float(zero[name]) == pytest.approx(float(expected[name]), rel=1e-3)
