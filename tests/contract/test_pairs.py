"""Everything with everything: each pair of callbacks, ours and Lightning's, on each kind of module.

A cell either works, which every callback of the pair checks by its own promise, also after a resume; or it is refused
before the first step, with what to do instead.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from support import CLASSES, FEATURES, assert_same_state, loader, trainer
from torch import Tensor, nn

import lightning_structopt as so
from lightning_structopt.shrinking.loading import plan_in

EPOCHS, BATCHES, RATE, HIDDEN = 4, 3, 0.05, 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings(
        "ignore:You are using `LearningRateMonitor` callback with models that have no"
    ),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The provided params to be frozen"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
]


class Plain(pl.LightningModule):
    """A backbone and a head."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU())
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.backbone(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self(inputs), labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = filter(lambda parameter: parameter.requires_grad, self.parameters())
        return torch.optim.SGD(trained, lr=RATE, momentum=0.9)


class Adaptive(Plain):
    """The same with a block that a gate may skip."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        body = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN))
        self.backbone.append(so.GatedBlock(body, so.Gate(HIDDEN)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + so.auxiliary_loss(self)


class Together(so.ParallelEnsemble):
    """Members that are trained together; the backbone is the first one's."""

    def __init__(self) -> None:
        super().__init__(
            [Plain(), Plain(2)],
            train_members=True,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
        )

    @property
    def backbone(self) -> nn.Module:
        return self.members[0].backbone


KINDS: dict[str, Callable[[], pl.LightningModule]] = {
    "plain": Plain,
    "distillation": lambda: so.DistillationModule(Plain(5), Plain()),
    "ensemble": Together,
    "adaptive": Adaptive,
}
CLASSES_OF: dict[str, type] = {
    "plain": Plain,
    "distillation": Plain,
    "ensemble": Together,
    "adaptive": Adaptive,
}
PARTS: dict[str, Callable[[], pl.Callback]] = {
    "IterativePruning": lambda: so.IterativePruning(0.5, verbose=False),
    "ChannelPruning": lambda: so.ChannelPruning(so.ChannelRatio(0.5), end=0.5, remove="now", verbose=False),
    "SparsityPenalty": lambda: so.SparsityPenalty(so.L1(0.1)),
    "LRDecay": lambda: so.LRDecay(so.Linear()),
    "NetworkGrowth": lambda: so.NetworkGrowth([1], widen=so.Widen(1.5), verbose=False),
    "SnapshotEnsemble": lambda: so.SnapshotEnsemble(cycles=2),
    "EMA": lambda: EMAWeightAveraging(decay=0.5),
    "SWA": lambda: StochasticWeightAveraging(RATE / 2, swa_epoch_start=3, annealing_epochs=1),
    "ModelCheckpoint": lambda: ModelCheckpoint(monitor="val_loss", mode="max", filename="best"),
    "EarlyStopping": lambda: EarlyStopping("val_loss", patience=9),
    "LearningRateMonitor": lambda: LearningRateMonitor("step"),
    "GradientAccumulation": lambda: GradientAccumulationScheduler({0: 1, 2: 2}),
    "BackboneFinetuning": lambda: BackboneFinetuning(2),
}
PAIRS = list(itertools.combinations(PARTS, 2))
OWNERS = "`ChannelPruning` and `IterativePruning` both own `.*Divide the parameters"
SHAPES = "keep its shape while it is pruned. Found `NetworkGrowth` with `.*Train twice"
CLASS = "load into one class. Found `SnapshotEnsemble` with `.*Train twice"
RATES = "one owner. Found `.*` and a `LambdaLR`, of .* or another callback. Remove one"
REFUSED = {
    ("IterativePruning", "ChannelPruning"): OWNERS,
    ("IterativePruning", "NetworkGrowth"): SHAPES,
    ("ChannelPruning", "NetworkGrowth"): SHAPES,
    ("ChannelPruning", "SnapshotEnsemble"): CLASS,
    ("NetworkGrowth", "SnapshotEnsemble"): CLASS,
    ("LRDecay", "SnapshotEnsemble"): RATES,
}
# Between Lightning's own: its SWALR has no rate for a group that joins later.
NOT_OURS = {("SWA", "BackboneFinetuning")}


class Watch(pl.Callback):
    """Comes last, and sees each batch and each step.

    Randomness, as of gates, comes from torch's generator, which checkpoints don't hold: each batch has its own seed.
    """

    def __init__(self, parts: dict[str, pl.Callback]) -> None:
        self.parts = parts
        self.rates: list[float] = []
        self.batches = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(100 * trainer.current_epoch + batch_idx)
        self.batches += 1
        backbone = original(pl_module).backbone
        if "BackboneFinetuning" in self.parts and trainer.current_epoch < 2:
            norms = [
                p
                for part in backbone.modules()
                if isinstance(part, nn.BatchNorm1d)
                for p in part.parameters()
            ]
            assert not any(p.requires_grad for p in backbone.parameters() if all(p is not n for n in norms))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        averages = [average for average in map(averaged, self.parts.values()) if average is not None]
        if pruning := self.parts.get("IterativePruning"):
            for module in (pl_module, *averages):
                weights = dict(module.named_parameters())
                assert not any(weights[name][~mask].any() for name, mask in pruning.masks.items())


def averaged(callback: pl.Callback) -> nn.Module | None:
    average = getattr(callback, "_average_model", None)
    return getattr(average, "module", average)


def original(module: pl.LightningModule) -> Any:
    return getattr(module, "student", module)


@dataclass
class Cell:
    """What came out of one training."""

    kind: str
    parts: dict[str, pl.Callback]
    trainer: pl.Trainer
    module: pl.LightningModule
    watch: Watch
    last: Path

    def load(self, path: str | Path) -> nn.Module:
        """Load a checkpoint as its reader would."""
        made = CLASSES_OF[self.kind]
        if plan_in(torch.load(path, weights_only=True)) is not None and "ChannelPruning" in self.parts:
            return so.load_shrunk(made, path)
        if "NetworkGrowth" in self.parts:
            return so.load_grown(made, path)
        return made.load_from_checkpoint(path, weights_only=True)


def fit(folder: Path, kind: str, pair: tuple[str, ...], epoch: int | None = None) -> Cell:
    """Train a cell, or go on from the checkpoint of an ``epoch``."""
    parts = {name: PARTS[name]() for name in pair}
    if isinstance(best := parts.get("ModelCheckpoint"), ModelCheckpoint):
        best.dirpath = str(folder / f"best-{epoch}")
    watch = Watch(parts)
    saved = ModelCheckpoint(folder / f"saved-{epoch}", save_top_k=-1, filename="{epoch}")
    logger = CSVLogger(folder, version="" if epoch is None else epoch)
    run = trainer(
        folder, *parts.values(), saved, watch, max_epochs=EPOCHS, logger=logger, log_every_n_steps=1
    )
    module = KINDS[kind]()
    ckpt = None if epoch is None else folder / "saved-None" / f"epoch={epoch}.ckpt"
    run.fit(module, loader(8 * BATCHES), loader(), ckpt_path=ckpt)
    return Cell(kind, parts, run, module, watch, folder / f"saved-{epoch}" / f"epoch={EPOCHS - 1}.ckpt")


def steps(cell: Cell) -> int:
    return 10 if "GradientAccumulation" in cell.parts else EPOCHS * BATCHES


def pruned(cell: Cell, callback: so.IterativePruning) -> None:
    weights = dict(cell.module.named_parameters())
    total = sum(mask.numel() for mask in callback.masks.values())
    gone = sum(int((~mask).sum()) for mask in callback.masks.values())
    assert gone == round(0.5 * total)
    zeros = sum(int((weights[name] == 0).sum()) for name in callback.masks)
    assert zeros >= gone if "SparsityPenalty" in cell.parts else zeros == gone


def channels_gone(cell: Cell, callback: so.ChannelPruning) -> None:
    assert callback.left == 0.5
    assert callback.plan.is_done(cell.module)
    fresh = sum(p.numel() for p in KINDS[cell.kind]().parameters())
    assert sum(p.numel() for p in cell.module.parameters()) < fresh


def penalized(cell: Cell, callback: so.SparsityPenalty) -> None:
    assert cell.trainer.callback_metrics["penalty/zeros"] > 0.05
    assert cell.trainer.callback_metrics["penalty/value"] > 0


def decayed(cell: Cell, callback: so.LRDecay) -> None:
    length = steps(cell)
    mine = length - 2 * BATCHES if "SWA" in cell.parts else length
    expected = [RATE * (1 - t / length) for t in range(mine)]
    assert cell.watch.rates[:mine] == pytest.approx(expected)


def grown(cell: Cell, callback: so.NetworkGrowth) -> None:
    assert callback.times == 1
    fresh = sum(p.numel() for p in KINDS[cell.kind]().parameters())
    assert sum(p.numel() for p in cell.module.parameters()) > fresh


def kept_snapshots(cell: Cell, callback: so.SnapshotEnsemble) -> None:
    length = steps(cell)
    mine = length - 2 * BATCHES if "SWA" in cell.parts else length
    half = length // 2
    expected = [RATE * (1 + math.cos(math.pi * (t % half) / half)) / 2 for t in range(mine)]
    assert cell.watch.rates[:mine] == pytest.approx(expected)
    assert len(callback.snapshots) == 2
    assert len(callback.members(CLASSES_OF[cell.kind])) == 2


def averages(cell: Cell, callback: pl.Callback) -> None:
    if "SWA" not in cell.parts:
        theirs = dict(averaged(callback).named_parameters())
        assert_same_state(dict(cell.module.named_parameters()), theirs)
    elif isinstance(callback, StochasticWeightAveraging):
        assert callback.n_averaged == 2


def kept_the_worst(cell: Cell, callback: ModelCheckpoint) -> None:
    cell.load(callback.best_model_path)


def watched(cell: Cell, callback: EarlyStopping) -> None:
    assert math.isfinite(callback.best_score)
    assert cell.trainer.current_epoch >= EPOCHS


def monitored(cell: Cell, callback: LearningRateMonitor) -> None:
    if cell.trainer.lr_scheduler_configs:
        (logged,) = {tuple(values) for name, values in callback.lrs.items() if name.endswith(("SGD", "pg1"))}
        assert logged[: steps(cell)] == pytest.approx(tuple(cell.watch.rates[: steps(cell)]))


def accumulated(cell: Cell, callback: GradientAccumulationScheduler) -> None:
    assert cell.trainer.global_step == 10 or "SWA" in cell.parts


def finetuned(cell: Cell, callback: BackboneFinetuning) -> None:
    assert all(parameter.requires_grad for parameter in original(cell.module).backbone.parameters())
    assert len(cell.trainer.optimizers[0].param_groups) == 2


PROMISES: dict[str, Callable[[Cell, Any], None]] = {
    "IterativePruning": pruned,
    "ChannelPruning": channels_gone,
    "SparsityPenalty": penalized,
    "LRDecay": decayed,
    "NetworkGrowth": grown,
    "SnapshotEnsemble": kept_snapshots,
    "EMA": averages,
    "SWA": averages,
    "ModelCheckpoint": kept_the_worst,
    "EarlyStopping": watched,
    "LearningRateMonitor": monitored,
    "GradientAccumulation": accumulated,
    "BackboneFinetuning": finetuned,
}


def whole(cell: Cell) -> None:
    """Assert what holds in every cell."""
    # In the epoch that SWA adds for the norms, Lightning takes steps with gradients that were there before.
    assert cell.trainer.global_step == steps(cell) or "SWA" in cell.parts
    trained = {id(p) for p in cell.module.parameters() if p.requires_grad}
    stepped = [id(p) for o in cell.trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert len(set(stepped)) == len(stepped), "an optimizer moves a parameter twice"
    assert trained <= set(stepped), "a parameter is not trained"
    assert all(p.isfinite().all() for p in cell.module.parameters())
    assert not any(
        o._optimizer_step_post_hooks or o._optimizer_step_pre_hooks for o in cell.trainer.optimizers
    )
    loaded = cell.load(cell.last)
    if "SWA" not in cell.parts:  # which takes its average over after the last checkpoint
        assert_same_state(dict(loaded.state_dict()), dict(cell.module.state_dict()))


def assert_cell(folder: Path, kind: str, pair: tuple[str, ...]) -> None:
    cell = fit(folder, kind, pair)
    whole(cell)
    for name in pair:
        PROMISES[name](cell, cell.parts[name])
    # A resumed BackboneFinetuning leaves frozen what it has unfrozen before, with Lightning alone.
    epoch = 1 if "BackboneFinetuning" in pair else 2
    resumed = fit(folder, kind, pair, epoch)
    assert resumed.watch.batches < cell.watch.batches
    assert_same_state(dict(resumed.module.state_dict()), dict(cell.module.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pair", [pair for pair in PAIRS if pair not in REFUSED and pair not in NOT_OURS], ids="+".join
)
def test_pair_works(kind: str, pair: tuple[str, str], tmp_path: Path) -> None:
    assert_cell(tmp_path, kind, pair)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", REFUSED, ids="+".join)
@pytest.mark.parametrize("turned", [False, True])
def test_pair_is_refused_before_the_first_step(
    kind: str, pair: tuple[str, str], turned: bool, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=REFUSED[pair]):
        fit(tmp_path, kind, pair[::-1] if turned else pair)
    assert not list(tmp_path.rglob("*.ckpt"))
