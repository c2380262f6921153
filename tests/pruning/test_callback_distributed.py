"""Two processes: the masks are the same on both, and a difference is an error."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import Classifier, adamw, assert_same_state, files_of_ranks, loader, trainer

from lightning_structopt.pruning import IterativePruning, Unstructured

WEIGHTS = 256


class Drift(pl.Callback):
    """Changes a weight on one rank behind DDP's back."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.net[0].weight[0] += 10


def fit_twice_and_drift(rank: int, root: Path) -> None:
    for name, pattern in (("global", Unstructured()), ("layer", Unstructured("layer"))):
        pruning = IterativePruning(0.8, pattern=pattern, interval="step", verbose=rank == 0)
        saved = ModelCheckpoint(root / name, save_last=True)
        run = trainer(root, pruning, saved, max_epochs=6, strategy="ddp", devices=2)
        module = Classifier(adamw)
        run.fit(module, loader())
        state = {"masks": pruning.masks, "module": module.state_dict(), "sparsity": pruning.sparsity}
        torch.save(state, root / f"{name}-{rank}.pt")
    try:
        trainer(root, IterativePruning(0.8, verbose=False), Drift(), strategy="ddp", devices=2).fit(
            Classifier(), loader()
        )
    except RuntimeError as error:
        (root / f"drift-{rank}.txt").write_text(str(error))


root = files_of_ranks(fit_twice_and_drift)


@pytest.mark.parametrize("name", ["global", "layer"])
def test_ranks_agree(root: Path, name: str) -> None:
    zero, one = (torch.load(root / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same_state(zero["masks"], one["masks"])
    assert zero["sparsity"] == pytest.approx(0.8, abs=1 / WEIGHTS)
    for name, mask in zero["masks"].items():
        assert torch.equal(zero["module"][name] != 0, mask)
        assert torch.equal(one["module"][name] != 0, mask)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_two_processes_resumes_on_one(root: Path, tmp_path: Path) -> None:
    pruning = IterativePruning(0.8, interval="step", verbose=False)
    run = trainer(tmp_path, pruning, max_epochs=8)
    run.fit(Classifier(adamw), loader(), ckpt_path=root / "global" / "last.ckpt")
    saved = torch.load(root / "global-0.pt", weights_only=True)
    assert_same_state(pruning.masks, saved["masks"])


def test_ranks_that_disagree_are_an_error_on_every_rank(root: Path) -> None:
    for rank in (0, 1):
        message = (root / f"drift-{rank}.txt").read_text()
        assert "Masks must be the same on every rank. Found 2 different ones on 2 ranks" in message
