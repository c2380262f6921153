"""Two processes: FSDP2 and DDP take the same steps as one process does on the same data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from least_squares import Regression, orthonormal
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from support import adamw, assert_same_state, files_of_ranks, trainer
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_structopt.pruning import IterativePruning
from lightning_structopt.regularization import L1, L2, GroupLasso, SparsityPenalty
from lightning_structopt.schedules import Constant, Warmup


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


def freezing() -> list[Any]:
    pruning = IterativePruning(0.1, begin=0.1, end=0.5, verbose=False)
    return [SparsityPenalty(L1(0.1), freeze_zeros=True), pruning]


CASES: dict[str, Any] = {
    "L1": (momentum, lambda: [SparsityPenalty(L1(0.1), schedule=Warmup(3, then=Constant()))]),
    "L1, Adam": (adamw, lambda: [SparsityPenalty(L1(0.1))]),
    "L2, Adam": (adamw, lambda: [SparsityPenalty(L2(0.1))]),
    "neurons": (momentum, lambda: [SparsityPenalty(GroupLasso(0.1))]),
    "neurons, Adam": (adamw, lambda: [SparsityPenalty(GroupLasso(0.1))]),
    "channels": (momentum, lambda: [SparsityPenalty(GroupLasso(0.1, "channel"))]),
    "channels, Adam": (adamw, lambda: [SparsityPenalty(GroupLasso(0.1, "channel"))]),
    "gradient": (momentum, lambda: [SparsityPenalty(GroupLasso(0.1, "channel"), "gradient")]),
    "freezing": (momentum, freezing),
}


class Sharded(Regression):
    """Rows and columns do not divide by two, and every rank sees all the data."""

    def __init__(self, optimizer: Any, shard: bool) -> None:
        inputs, targets, _ = orthonormal()
        torch.manual_seed(0)
        super().__init__(inputs, targets[:, :5], optimizer)
        self.shard = shard

    def configure_model(self) -> None:
        if self.shard and not isinstance(self.net.weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def fit(root: Path, name: str, kind: str, ckpt: Any = None) -> dict[str, Any]:
    optimizer, callbacks = CASES[name]
    strategies: dict[str, Any] = {
        "one": {},
        "ddp": {"strategy": "ddp", "devices": 2},
        "fsdp2": {
            "strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            "devices": 2,
        },
    }
    mine, saving = callbacks(), kind == "fsdp2" and name == "freezing"
    if saving:
        mine.append(ModelCheckpoint(root, save_top_k=-1, filename="{epoch}" + ("-again" if ckpt else "")))
    logger = CSVLogger(root, name=f"{kind} {name}", version="again" if ckpt else "once")
    run = trainer(root, *mine, logger=logger, max_epochs=3, use_distributed_sampler=False, **strategies[kind])
    module = Sharded(optimizer, shard=kind == "fsdp2")
    run.fit(module, DataLoader(range(40), batch_size=1), ckpt_path=ckpt)
    weight = module.net.weight.detach()
    masks = [callback.masks for callback in mine if isinstance(callback, IterativePruning)]
    values = {key: run.callback_metrics[key] for key in ("penalty/value", "penalty/zeros")}
    full = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return {"weight": full, "masks": masks, **values}


ON_RANKS = [*(("fsdp2", name) for name in CASES), ("ddp", "L1, Adam"), ("ddp", "freezing")]


def on_a_rank(rank: int, root: Path) -> None:
    for kind, name in ON_RANKS:
        torch.save(fit(root, name, kind), root / f"{kind} {name} {rank}.pt")
    torch.save(fit(root, "freezing", "fsdp2", root / "epoch=0.ckpt"), root / f"resumed {rank}.pt")


root = files_of_ranks(on_a_rank)


@pytest.mark.parametrize(("kind", "name"), ON_RANKS)
def test_two_ranks_do_what_one_does(root: Path, tmp_path: Path, kind: str, name: str) -> None:
    one = fit(tmp_path, name, "one")
    first, second = (torch.load(root / f"{kind} {name} {rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_state(first, second)
    torch.testing.assert_close(first, one, rtol=1e-6, atol=1e-9)
    assert torch.equal(first["weight"] == 0, one["weight"] == 0)
    assert name in {"L2, Adam", "gradient"} or (one["weight"] == 0).any()


def test_resume_equals_straight(root: Path) -> None:
    for rank in (0, 1):
        straight = torch.load(root / f"fsdp2 freezing {rank}.pt", weights_only=True)
        assert_same_state(torch.load(root / f"resumed {rank}.pt", weights_only=True), straight)
