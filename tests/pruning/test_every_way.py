"""Every way Lightning trains, with everything that prunes: the table in the README, cell by cell.

In each cell sparsity is exact, a resumed run equals a straight one bit for bit, and where mathematics says so
the mask is that of one process. What can't be supported is an error before the first step.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from support import Classifier, ManualClassifier, adamw, assert_same_state, dataset, run_ranks, trainer
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_structopt.pruning import IterativePruning, NByM, Random, RewindWeights, RigL, Taylor
from lightning_structopt.regularization import L1, SparsityPenalty

EPOCHS, WEIGHTS = 4, 256  # 16 optimizer steps, of 8 samples each
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
]


def pruning(sparsity: float = 0.8, **kwargs: Any) -> IterativePruning:
    return IterativePruning(sparsity, verbose=False, **{"end": 0.6, "interval": "step", **kwargs})


FEATURES: dict[str, Callable[[], list[pl.Callback]]] = {
    "Magnitude": lambda: [pruning()],
    "Taylor": lambda: [pruning(criterion=Taylor())],
    "NByM": lambda: [pruning(0.5, pattern=NByM(2, 4))],
    "RewindWeights": lambda: [pruning(begin=0.2, every=3, rewind=RewindWeights(to=0.1))],
    "SparsityPenalty": lambda: [pruning(0.3), SparsityPenalty(L1(3e-2), freeze_zeros=True)],
    "RigL": lambda: [pruning(criterion=Random(seed=0), regrow=RigL(every=3, until=0.6))],
}


@dataclass(frozen=True)
class Way:
    """How a module is trained.

    Args:
        options: For the trainer.
        batch_size: Of the loader of one rank.
        dtype: Of weights and data. In double precision sums do not depend on how they are divided among ranks.
        same_mask: Whether the mask is that of one process with plain batches.
        make: Makes the module.
        more: Makes further callbacks.
    """

    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    dtype: torch.dtype = torch.float64
    same_mask: bool = True
    make: Callable[[], Any] = lambda: Classifier(adamw)
    more: Callable[[], list[pl.Callback]] = list


class Sharded(Classifier):
    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, DTensor):
            for part in (self.net[0], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])


def fsdp2() -> dict[str, Any]:
    return {"strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), "devices": 2}


WAYS: dict[str, Way] = {
    "single": Way(),
    "DDP x2": Way({"strategy": "ddp", "devices": 2}, batch_size=4),
    "FSDP2 x2": Way(batch_size=4, make=lambda: Sharded(adamw)),  # and the strategy, made on each rank
    "bf16-mixed": Way({"precision": "bf16-mixed"}, dtype=torch.float32, same_mask=False),
    "accumulation 4": Way({"accumulate_grad_batches": 4}, batch_size=2),
    "manual": Way(make=lambda: ManualClassifier(optimizer=adamw), same_mask=False),
    "EMA": Way(more=lambda: [EMAWeightAveraging(decay=0.8)]),
    "SWA": Way(more=lambda: [StochasticWeightAveraging(1e-2, swa_epoch_start=3, annealing_epochs=1)]),
    "torch.compile": Way(make=lambda: torch.compile(Classifier(adamw), backend="aot_eager")),
}
ON_RANKS = ("DDP x2", "FSDP2 x2")
REFUSED = {("EMA", "RewindWeights"), ("SWA", "RewindWeights")}
CELLS = list(itertools.product(WAYS, FEATURES))


class Count(pl.Callback):
    """Counts batches: a run that resumes trains fewer of them."""

    batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


def batches(way: str) -> DataLoader:
    """Return the same 8 samples for an optimizer step, however they come together."""
    inputs, labels = dataset().tensors
    data = TensorDataset(inputs.to(WAYS[way].dtype), labels)
    # Lightning's own sampler would shuffle.
    mine = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False) if way in ON_RANKS else None
    return DataLoader(data, WAYS[way].batch_size, sampler=mine)


def fit(root: Path, way: str, feature: str, epoch: int | None = None) -> dict[str, Any]:
    """Train one cell, from the checkpoint after ``epoch`` if that is given, and return what came out."""
    how, callbacks = WAYS[way], FEATURES[feature]()
    folder = root / way / feature
    saved = ModelCheckpoint(
        folder, every_n_epochs=2, save_top_k=-1, filename="{epoch}" if epoch is None else "again-{epoch}"
    )
    options = fsdp2() if way == "FSDP2 x2" else how.options
    count = Count()
    run = trainer(
        root,
        *callbacks,
        *how.more(),
        saved,
        count,
        max_epochs=EPOCHS,
        use_distributed_sampler=False,
        **options,
    )
    module = how.make()
    module.net[1] = nn.Identity()  # a norm's statistics would depend on the batches of each rank
    checkpoint = None if epoch is None else folder / f"epoch={epoch}.ckpt"
    run.fit(module.to(how.dtype), batches(way), ckpt_path=checkpoint)
    parameters = {name: parameter.detach() for name, parameter in run.lightning_module.named_parameters()}
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in parameters.items()}
    return {"masks": callbacks[0].masks, "weights": weights, "batches": count.batches}


def on_ranks(rank: int, root: Path) -> None:
    for way in ON_RANKS:
        for feature in FEATURES:
            cell = [fit(root, way, feature), fit(root, way, feature, epoch=1)]
            torch.save(cell, root / f"{way}-{feature}-{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list]:
    """Start two processes once, for all cells that need them, and return what reads a cell's end."""
    root = tmp_path_factory.mktemp("ranks")
    run_ranks(on_ranks, root)
    return lambda way, feature: [
        torch.load(root / f"{way}-{feature}-{rank}.pt", weights_only=True) for rank in (0, 1)
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    return cache(lambda feature: fit(tmp_path_factory.mktemp("single"), "single", feature))


def marks(way: str) -> list[Any]:
    # Dynamo warns of what it meets in Lightning.
    return [pytest.mark.filterwarnings("ignore")] if way == "torch.compile" else []


@pytest.mark.parametrize(
    ("way", "feature"),
    [pytest.param(*cell, marks=marks(cell[0])) for cell in CELLS if cell not in REFUSED],
)
def test_cell(way: str, feature: str, request: Any, tmp_path: Path) -> None:
    if way in ON_RANKS:
        first, second = request.getfixturevalue("ranks")(way, feature)
        assert_same_state(first, second)
        straight, resumed = first
    else:
        straight, resumed = fit(tmp_path, way, feature), fit(tmp_path, way, feature, epoch=1)
    assert resumed.pop("batches") == straight.pop("batches") // 2
    assert_same_state(resumed, straight)
    assert_sparsity(feature, **straight)
    if WAYS[way].same_mask:
        expected = request.getfixturevalue("reference")(feature)
        assert_same_state(straight["masks"], expected["masks"])
        if not WAYS[way].more():  # what is averaged has other weights
            torch.testing.assert_close(straight["weights"], expected["weights"])


def assert_sparsity(feature: str, masks: dict, weights: dict) -> None:
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == {"NByM": 128, "SparsityPenalty": pruned}.get(feature, round(0.8 * WEIGHTS))
    for name, mask in masks.items():
        zeros = weights[name] == 0
        # What grows in the last exchanges may still be at zero.
        assert torch.equal(zeros, ~mask) or (feature == "RigL" and zeros[~mask].all())
        if feature == "NByM":
            assert (mask.view(len(mask), -1, 4).sum(-1) == 2).all()
    if feature == "SparsityPenalty":
        assert round(0.3 * WEIGHTS) < pruned < WEIGHTS


@pytest.mark.parametrize(("way", "feature"), sorted(REFUSED))
def test_refused_cell(way: str, feature: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an average of weights would mix the rounds. Found a callback that"):
        fit(tmp_path, way, feature)
    assert not list(tmp_path.rglob("*.ckpt"))
