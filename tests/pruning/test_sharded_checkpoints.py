"""Checkpoints travel between numbers of ranks: full or in parts, from two to one and from one to two.

Two ranks see the halves of the batches that one sees, in double precision, so a resumed run ends where any
straight run ends, whoever wrote the checkpoint.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from support import Classifier, adamw, assert_same_state, dataset, run_ranks, trainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_structopt.pruning import IterativePruning, Random, RewindWeights, RigL, Taylor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]
FEATURES: dict[str, Callable[[], IterativePruning]] = {
    # Of everything that a checkpoint holds: masks, evidence, a snapshot; and what was exchanged when.
    "rounds": lambda: IterativePruning(
        0.8, Taylor(), begin=0.2, every=3, rewind=RewindWeights(to=0.1), interval="step", verbose=False
    ),
    "RigL": lambda: IterativePruning(0.8, Random(seed=0), regrow=RigL(every=3), verbose=False),
}
FORMATS = ("full", "distributed")


class Count(pl.Callback):
    """Counts batches: a run that resumes trains fewer of them."""

    batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


class Sharded(Classifier):
    """17 rows do not divide by two."""

    def __init__(self, sharded: bool) -> None:
        super().__init__(adamw, hidden=17)
        self.net[1] = nn.Identity()
        self.double()
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded and not isinstance(self.net[0].weight, DTensor):
            for part in (self.net[0], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def fit(root: Path, feature: str, ranks: int, kind: str, ckpt: Path | None = None) -> dict[str, Any]:
    """Train on ``ranks`` of FSDP2 (0: on none, with the plain trainer), saving checkpoints of that ``kind``."""
    pruning = FEATURES[feature]()
    saved = ModelCheckpoint(
        root, every_n_epochs=2, save_top_k=-1, filename=f"{feature}-{ranks}-{kind}-" + "{epoch}"
    )
    count, more = Count(), [] if ckpt else [saved]
    options: dict[str, Any] = {} if ranks == 0 else {"devices": ranks, "strategy": strategy(ranks, kind)}
    run = trainer(root, pruning, count, *more, max_epochs=4, use_distributed_sampler=False, **options)
    inputs, labels = dataset().tensors
    data, rank = TensorDataset(inputs.double(), labels), int(os.environ.get("RANK", 0))
    sampler = DistributedSampler(data, ranks, rank, shuffle=False) if ranks else None
    run.fit(Sharded(ranks > 0), DataLoader(data, 8 // max(ranks, 1), sampler=sampler), ckpt_path=ckpt)
    weights = {n: p.detach() for n, p in run.lightning_module.named_parameters()}
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in weights.items()}
    assert count.batches == (8 if ckpt else 16)
    return {"masks": pruning.masks, "weights": whole}


def strategy(ranks: int, kind: str) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=kind == "distributed"
    )


def name_of(feature: str, ranks: int, kind: str) -> str:
    return f"{feature}-{ranks}-{kind}-epoch=1.ckpt"


@contextmanager
def world_of(ranks: int) -> Iterator[None]:
    """Let this process be one of ``ranks`` for a while."""
    before, port = dict(os.environ), int(os.environ["MASTER_PORT"])
    if ranks == 1:
        os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port + 1)}
    yield
    dist.destroy_process_group()
    os.environ |= before


def on_ranks(rank: int, root: Path) -> None:
    """The first process alone, then both, then the first alone again: a start of processes takes seconds."""
    cells = [(feature, kind) for feature in FEATURES for kind in FORMATS]
    if rank == 0:
        with world_of(1):
            for feature, kind in cells:
                fit(root, feature, 1, kind)
    with world_of(2):
        for feature, kind in cells:
            straight = fit(root, feature, 2, kind)
            torch.save(straight, root / f"straight {feature} {kind} {rank}.pt")
            resumed = fit(root, feature, 2, kind, root / name_of(feature, 1, kind))
            torch.save(resumed, root / f"1 to 2 {feature} {kind} {rank}.pt")
        for feature in FEATURES:
            resumed = fit(root, feature, 2, "full", root / name_of(feature, 0, "full"))
            torch.save(resumed, root / f"plain to 2 {feature} full {rank}.pt")
    if rank == 0:
        with world_of(1):
            for feature, kind in cells:
                resumed = fit(root, feature, 1, kind, root / name_of(feature, 2, kind))
                torch.save(resumed, root / f"2 to 1 {feature} {kind} 0.pt")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for feature in FEATURES:
        torch.save(fit(root, feature, 0, "full"), root / f"plain {feature} full 0.pt")
    run_ranks(on_ranks, root)
    return root


def load(root: Path, name: str) -> Any:
    return torch.load(root / f"{name}.pt", weights_only=True)


def assert_same_end(root: Path, feature: str, found: dict[str, Any]) -> None:
    expected = load(root, f"plain {feature} full 0")
    assert_same_state(found["masks"], expected["masks"])
    torch.testing.assert_close(found["weights"], expected["weights"])
    pruned = sum(int((~mask).sum()) for mask in found["masks"].values())
    assert pruned == round(0.8 * (12 * 17 + 17 * 4))
    assert all(not found["weights"][name][~mask].any() for name, mask in found["masks"].items())


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("journey", ["straight", "1 to 2", "2 to 1"])
def test_every_journey_ends_where_the_straight_run_does(
    root: Path, feature: str, kind: str, journey: str
) -> None:
    assert_same_end(root, feature, load(root, f"{journey} {feature} {kind} 0"))
    if journey != "2 to 1":
        assert_same_state(
            load(root, f"{journey} {feature} {kind} 1"), load(root, f"{journey} {feature} {kind} 0")
        )


@pytest.mark.parametrize("feature", FEATURES)
def test_full_checkpoints_go_to_the_plain_trainer_and_back(root: Path, tmp_path: Path, feature: str) -> None:
    assert_same_end(root, feature, load(root, f"plain to 2 {feature} full 0"))
    assert_same_end(root, feature, fit(tmp_path, feature, 0, "full", root / name_of(feature, 2, "full")))


@pytest.mark.parametrize("feature", FEATURES)
def test_checkpoints_in_parts_are_in_parts(root: Path, feature: str) -> None:
    assert (root / name_of(feature, 2, "distributed")).is_dir()
    assert (root / name_of(feature, 2, "full")).is_file()
