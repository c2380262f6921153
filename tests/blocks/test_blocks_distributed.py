"""Two processes, by DDP and by FSDP2: blocks with nothing to do wait for nobody, and ranks agree."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adaptive_nets import NETS, Adaptive, closed
from lightning.pytorch.strategies import ModelParallelStrategy
from support import assert_same_state, dataset, files_of_ranks, loader, trainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_structopt.blocks import AdaptiveReport, EarlyExit, GatedBlock, RoutedBlock

SHARDED = ["gated", "routed", "act", "exits"]


class Uneven(Adaptive):
    """With gates that are open on one rank alone, and a router that sends each rank's rows elsewhere, on demand."""

    def __init__(self, name: str, empty: bool = False) -> None:
        super().__init__(name)
        if empty:
            closed(self.net)


class Sharded(Adaptive):
    """Each body, expert, cell and stage by itself."""

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for part in list(self.net.modules()):
            if isinstance(part, GatedBlock):
                fully_shard(part.body, mesh=mesh)
            elif isinstance(part, RoutedBlock):
                for expert in part.experts:
                    fully_shard(expert, mesh=mesh)
            elif isinstance(part, EarlyExit):
                for stage in part.stages:
                    fully_shard(stage, mesh=mesh)
            elif type(part).__name__ == "AdaptiveComputationUnit":
                fully_shard(part.cell, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def whole(module: nn.Module) -> dict[str, Any]:
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in module.state_dict().items()}


def ddp(rank: int, root: Path) -> None:
    for name in NETS:
        for empty in (False, True):
            module, report = Uneven(name, empty), AdaptiveReport(verbose=False)
            run = trainer(root, report, strategy="ddp", devices=2, max_epochs=2)
            run.fit(module, loader(), loader())
            logged = {key: float(value) for key, value in run.callback_metrics.items() if "executed" in key}
            saved = {"weights": module.state_dict(), "logged": logged, "steps": run.global_step}
            torch.save(saved, root / f"ddp-{name}-{empty}-{rank}.pt")
    for name in SHARDED:
        fsdp2(rank, root, name)
    refuses_to_fit_thresholds()


def fsdp2(rank: int, root: Path, name: str) -> None:
    module = Sharded(name)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    run = trainer(root, strategy=strategy, devices=2, max_epochs=2, accumulate_grad_batches=2)
    # The last batch has one sample, so that ranks differ in who has work, in evaluation too.
    run.fit(module, loader(), DataLoader(dataset(6), batch_size=1))
    found = {"weights": whole(module), "accuracy": float(run.callback_metrics["val_acc"])}
    torch.save(found, root / f"fsdp2-{name}-{rank}.pt")


def refuses_to_fit_thresholds() -> None:
    with pytest.raises(ValueError, match="Found 2 processes"):
        NETS["exits"]().fit_threshold([torch.zeros(2, 12)], 0.9)


root = files_of_ranks(ddp)


def load(root: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(root / f"{name}-{rank}.pt", weights_only=True)


def trained(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state["weights"].items() if "running" not in key}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("empty", [False, True], ids=["some work", "no work"])
def test_ranks_agree_under_ddp(root: Path, name: str, empty: bool) -> None:
    zero, one = (load(root, f"ddp-{name}-{empty}", rank) for rank in (0, 1))
    assert zero["steps"] == 4
    assert_same_state(trained(zero), trained(one))
    assert zero["logged"] == one["logged"]
    assert bool(zero["logged"]) == (name != "capsules")


@pytest.mark.parametrize("name", SHARDED)
def test_ranks_agree_under_fsdp2(root: Path, name: str) -> None:
    zero, one = (load(root, f"fsdp2-{name}", rank) for rank in (0, 1))
    assert_same_state(trained(zero), trained(one))
    fresh = Adaptive(name)
    assert fresh.state_dict().keys() == zero["weights"].keys()
    moved = [key for key, value in fresh.named_parameters() if not torch.equal(value, zero["weights"][key])]
    assert len(moved) >= len(list(fresh.parameters())) - 4
