"""FSDP2 on two processes: masks of shards are the masks of the whole, and checkpoints travel between rank counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from support import Classifier, adamw, assert_same_state, files_of_ranks, loader, trainer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_structopt.pruning import (
    Block,
    ErdosRenyi,
    IterativePruning,
    Magnitude,
    NByM,
    Neurons,
    Pattern,
    Unstructured,
)
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.one_shot import advance, prune

PATTERNS: dict[str, tuple[Pattern, float]] = {
    "global": (Unstructured(), 0.8),
    "layer": (Unstructured("layer"), 0.7),
    "ERK": (Unstructured("layer", ErdosRenyi()), 0.7),
    "2:4": (NByM(2, 4), 0.5),
    "block": (Block((1, 4)), 0.5),
    "neurons": (Neurons("global"), 0.5),
}
KINDS = ["normal", "ties"]


class Sharded(Classifier):
    """17 rows do not divide by two."""

    def __init__(self) -> None:
        super().__init__(adamw, hidden=17)

    def configure_model(self) -> None:
        if not isinstance(self.net[0].weight, torch.distributed.tensor.DTensor):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def plain(kind: str) -> nn.Module:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8), nn.Linear(8, 4))
    if kind == "ties":
        for parameter in module.parameters():
            parameter.data = torch.randint(-2, 3, parameter.shape).float()
    return module


def strategy(ranks: int = 2, distributed: bool = False) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=distributed
    )


def sharded_masks(root: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for kind in KINDS:
        for name, (pattern, sparsity) in PATTERNS.items():
            module = plain(kind)
            fully_shard(module[0], mesh=mesh)
            fully_shard(module[1], mesh=mesh)  # and the third is on every rank as a whole
            masks = MaskSet({n: p for n, p in module.named_parameters() if p.ndim > 1})
            for part in (0.5, 1.0):
                advance(masks, sparsity * part, Magnitude(), pattern)
            found = dict(masks.whole())
            torch.save(
                {"masks": found, "pruned": masks.pruned}, root / f"{kind}-{name}-{mesh.get_local_rank()}.pt"
            )


def fits(rank: int, root: Path) -> None:
    def fit(name: str, ckpt: Any = None, distributed: bool = False) -> IterativePruning:
        pruning = IterativePruning(0.8, interval="step", begin=0.0, end=0.5, verbose=False)
        saved = ModelCheckpoint(root / name, save_top_k=-1, filename="{epoch}")
        run = trainer(
            root,
            pruning,
            saved,
            max_epochs=6,
            strategy=strategy(2, distributed),
            devices=2,
            gradient_clip_val=0.5,
        )
        module = Sharded()
        run.fit(module, loader(), ckpt_path=ckpt)
        weights = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in module.state_dict().items()}
        torch.save({"masks": pruning.masks, "weights": weights}, root / f"{name}-{rank}.pt")
        return pruning

    fit("straight")
    fit("resumed", ckpt=root / "straight" / "epoch=1.ckpt")
    fit("split", distributed=True)
    fit("resumed split", ckpt=root / "split" / "epoch=1.ckpt", distributed=True)
    sharded_masks(root)


root = files_of_ranks(fits)


def load(root: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return torch.load(root / f"{name}-{rank}.pt", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PATTERNS)
def test_masks_of_shards_are_those_of_the_whole(root: Path, kind: str, name: str) -> None:
    pattern, sparsity = PATTERNS[name]
    module = plain(kind)
    masks = MaskSet({n: p for n, p in module.named_parameters() if p.ndim > 1})
    for part in (0.5, 1.0):
        advance(masks, sparsity * part, Magnitude(), pattern)
    for rank in (0, 1):
        found = load(root, f"{kind}-{name}", rank)
        assert found["pruned"] == masks.pruned
        assert_same_state(found["masks"], masks.masks())


@pytest.mark.parametrize("name", ["straight", "split"])
def test_sparsity_is_exact_and_ranks_agree(root: Path, name: str) -> None:
    zero, one = load(root, name, 0), load(root, name, 1)
    assert_same_state(zero["masks"], one["masks"])
    assert sum(int((~mask).sum()) for mask in zero["masks"].values()) == round(0.8 * (12 * 17 + 17 * 4))
    for parameter, mask in zero["masks"].items():
        assert torch.equal(zero["weights"][parameter] != 0, mask)


@pytest.mark.parametrize("name", ["straight", "split"])
def test_resume_equals_straight(root: Path, name: str) -> None:
    resumed = load(root, "resumed" if name == "straight" else "resumed split")
    straight = load(root, name)
    for state in (resumed, straight):  # of the statistics that differ by rank, only one rank's are saved
        state["weights"] = {key: value for key, value in state["weights"].items() if "running" not in key}
    assert_same_state(resumed, straight)


def test_a_full_checkpoint_of_two_ranks_resumes_on_one(root: Path, tmp_path: Path) -> None:
    pruning = IterativePruning(0.8, interval="step", begin=0.0, end=0.5, verbose=False)
    run = trainer(tmp_path, pruning, max_epochs=6)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        run.fit(Classifier(adamw, hidden=17), loader(), ckpt_path=root / "straight" / "epoch=4.ckpt")
    assert_same_state(pruning.masks, load(root, "straight")["masks"])


def test_prune_works_on_what_it_is_given() -> None:
    module = plain("normal")
    assert prune(module, 0.5, pattern=NByM(2, 4))["0.weight"].sum() == 6 * 16
