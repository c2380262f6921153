"""A run that was killed and resumed ends with the same weights, masks and optimizer state, bit for bit."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from support import (
    Classifier,
    ManualClassifier,
    adamw,
    assert_same_state,
    dataset,
    loader,
    sgd,
    trainer,
    zeros,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_structopt.pruning import IterativePruning, OneCycleRamp, Unstructured

EPOCHS, WEIGHTS = 6, 256
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Kill(pl.Callback):
    """Ends the process's training without ceremony before a batch is trained."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.at:
            raise KeyboardInterrupt


def pruning(**kwargs: Any) -> IterativePruning:
    return IterativePruning(0.85, **{"begin": 0.1, "end": 0.8, "verbose": False, **kwargs})


def run(
    root: Path, module: Any, callback: Any, data: Any, *more: Any, ckpt: Any = None, **kwargs: Any
) -> Any:
    last = ModelCheckpoint(root, save_last=True, **kwargs.pop("saving", {}))
    this = trainer(root, *([callback] if callback else []), last, *more, max_epochs=EPOCHS, **kwargs)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        this.fit(module, data, ckpt_path=ckpt)
    return this


def assert_same_end(straight: Any, resumed: Any, one: IterativePruning, other: IterativePruning) -> None:
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict(), "module")
    assert_same_state(other.masks, one.masks, "masks")
    assert zeros(resumed.lightning_module) == sum(int((~mask).sum()) for mask in one.masks.values())
    assert one.sparsity == pytest.approx(0.85, abs=1 / WEIGHTS)
    for left, right in zip(resumed.optimizers, straight.optimizers, strict=True):
        assert_same_state(left.state_dict(), right.state_dict(), "optimizer")


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Classifier(sgd), {}),
        (lambda: Classifier(adamw), {"interval": "step", "every": 3}),
        (lambda: Classifier(adamw), {"ramp": OneCycleRamp(), "pattern": Unstructured("layer")}),
        (lambda: ManualClassifier(optimizer=adamw), {"interval": "step"}),
    ],
    ids=["epochs", "steps", "layers", "manual"],
)
def test_killed_after_any_epoch(tmp_path: Path, epoch: int, make: Any, options: dict) -> None:
    one, other = pruning(**options), pruning(**options)
    straight = run(tmp_path / "straight", make(), one, loader())
    run(tmp_path / "killed", make(), pruning(**options), loader(), Kill(at=4 * epoch))
    resumed = run(tmp_path / "killed", make(), other, loader(), ckpt=tmp_path / "killed" / "last.ckpt")
    assert_same_end(straight, resumed, one, other)


@pytest.mark.parametrize("batch", [5, 10, 15])
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_killed_in_the_middle_of_an_epoch_with_a_stateful_loader(
    tmp_path: Path, batch: int, interval: Any
) -> None:
    def data() -> StatefulDataLoader:
        return StatefulDataLoader(dataset(), batch_size=8)

    saving = {"saving": {"every_n_train_steps": 1}}
    one, other = pruning(interval=interval), pruning(interval=interval)
    straight = run(tmp_path / "straight", Classifier(adamw), one, data(), **saving)
    run(tmp_path / "killed", Classifier(adamw), pruning(interval=interval), data(), Kill(at=batch), **saving)
    resumed = run(
        tmp_path / "killed",
        Classifier(adamw),
        other,
        data(),
        ckpt=tmp_path / "killed" / "last.ckpt",
        **saving,
    )
    assert_same_end(straight, resumed, one, other)


def test_killed_in_the_middle_of_an_epoch_with_a_plain_loader_keeps_masks_right(tmp_path: Path) -> None:
    """Lightning replays a plain loader from its first batch, so weights differ; the masks' sizes may not."""
    saving = {"saving": {"every_n_train_steps": 1}}
    for interval in ("epoch", "step"):
        root, other = tmp_path / interval, pruning(interval=interval)
        run(root, Classifier(), pruning(interval=interval), loader(), Kill(at=10), **saving)
        before = torch.load(root / "last.ckpt", weights_only=True)["state_dict"]
        dead = {name: value == 0 for name, value in before.items() if value.ndim > 1}
        resumed = run(root, Classifier(), other, loader(), ckpt=root / "last.ckpt", **saving)
        assert zeros(resumed.lightning_module) == round(0.85 * WEIGHTS)
        assert all(not (other.masks[name] & was_dead).any() for name, was_dead in dead.items())


def test_killed_while_an_average_is_kept(tmp_path: Path) -> None:
    def ema() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.8)

    one, other = pruning(), pruning()
    straight = run(tmp_path / "straight", Classifier(), one, loader(), ema())
    run(tmp_path / "killed", Classifier(), pruning(), loader(), ema(), Kill(at=13))
    resumed = run(
        tmp_path / "killed", Classifier(), other, loader(), ema(), ckpt=tmp_path / "killed" / "last.ckpt"
    )
    assert_same_end(straight, resumed, one, other)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_killed_without_clipping_and_resumed_with_it(tmp_path: Path, optimizer: Any) -> None:
    """What optimizers remember of dead weights, whose gradients weren't masked, doesn't move them."""
    sparse = {"begin": 0.0, "end": 0.1, "interval": "step"}
    run(tmp_path, Classifier(optimizer), pruning(**sparse), loader(), Kill(at=9))
    module = Classifier(optimizer)
    run(tmp_path, module, pruning(**sparse), loader(), ckpt=tmp_path / "last.ckpt", gradient_clip_val=1.0)
    assert zeros(module) == round(0.85 * WEIGHTS)


def test_checkpoints_keep_the_users_keys_and_load_into_the_plain_class(tmp_path: Path) -> None:
    run(tmp_path, Classifier(), pruning(), loader())
    plain = Classifier()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == plain.state_dict().keys()
    plain.load_state_dict(checkpoint["state_dict"])
    assert zeros(plain) == round(0.85 * WEIGHTS)
    loaded = Classifier.load_from_checkpoint(tmp_path / "last.ckpt", optimizer=sgd)
    trainer(tmp_path).validate(loaded, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


def test_a_checkpoint_without_pruning_starts_dense(tmp_path: Path) -> None:
    run(tmp_path, Classifier(), None, loader(), Kill(at=8))
    callback = pruning()
    resumed = run(tmp_path, Classifier(), callback, loader(), ckpt=tmp_path / "last.ckpt")
    assert zeros(resumed.lightning_module) == round(0.85 * WEIGHTS)


def test_a_checkpoint_of_another_module_is_refused_before_training(tmp_path: Path) -> None:
    run(tmp_path, Classifier(), pruning(), loader(), Kill(at=12))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = next(value for key, value in checkpoint["callbacks"].items() if "IterativePruning" in key)
    state["masks"]["net.3.weight"]["shape"] = [2, 32]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"`net.3.weight` with shape \(2, 32\) in the checkpoint and shape \(4, 16\)"
    ):
        run(tmp_path, Classifier(), pruning(), loader(), ckpt=tmp_path / "other.ckpt")


@pytest.mark.filterwarnings("ignore:.fit.ckpt_path", "ignore:.*was called without a model")
def test_a_checkpoint_written_on_an_exception_holds_the_masks(tmp_path: Path) -> None:
    callback = pruning()
    run(tmp_path, Classifier(), callback, loader(), OnExceptionCheckpoint(tmp_path, "crash"), Kill(at=16))
    saved = torch.load(tmp_path / "crash.ckpt", weights_only=True)
    other = pruning()
    other.load_state_dict(next(v for k, v in saved["callbacks"].items() if "IterativePruning" in k))
    assert other.sparsity == callback.sparsity > 0


def test_weights_are_evaluated_from_a_checkpoint_with_the_callback_in_place(tmp_path: Path) -> None:
    run(tmp_path, Classifier(), pruning(), loader())
    callback = pruning()
    trainer(tmp_path, callback).test(Classifier(), loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert callback.sparsity == round(0.85 * WEIGHTS) / WEIGHTS
