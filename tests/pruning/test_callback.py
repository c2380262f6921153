"""`IterativePruning` in real training: exact sparsity, and zeros that stay."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from support import Classifier, ManualClassifier, adamw, assert_same_state, loader, sgd, trainer, zeros
from torch import nn

from lightning_structopt.pruning import (
    Block,
    CubicRamp,
    GeometricRamp,
    IterativePruning,
    LinearRamp,
    Magnitude,
    NByM,
    Neurons,
    OneCycleRamp,
    OneShotRamp,
    Ramp,
    Unstructured,
)


def rmsprop(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, weight_decay=0.1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, weight_decay=0.1, amsgrad=True)


class Watch(pl.Callback):
    """Records sparsity and asserts after every batch that the weights have the mask's zeros."""

    def __init__(self, pruning: IterativePruning) -> None:
        self.pruning = pruning
        self.sparsities: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        for name, mask in self.pruning.masks.items():
            assert not parameters[name][~mask].any(), f"{name} was revived"
        self.sparsities.append(self.pruning.sparsity)


def fit(
    root: Path,
    module: pl.LightningModule,
    pruning: IterativePruning,
    *callbacks: pl.Callback,
    data: Any = None,
    **kwargs: Any,
) -> Watch:
    watch = Watch(pruning)
    trainer(root, pruning, watch, *callbacks, **kwargs).fit(module, loader() if data is None else data)
    return watch


def quiet(sparsity: float = 0.8, **kwargs: Any) -> IterativePruning:
    return IterativePruning(
        sparsity, **{"begin": 0.2, "end": 0.8, "interval": "step", "verbose": False, **kwargs}
    )


WEIGHTS = 12 * 16 + 16 * 4

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip by norm": {"gradient_clip_val": 0.1},
    "clip by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2, "max_epochs": 8},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("optimizer", [sgd, adam, adamw, rmsprop])
@pytest.mark.parametrize("way", WAYS)
def test_zero_stays_zero_and_sparsity_is_exact(tmp_path: Path, optimizer: Any, way: str) -> None:
    module, pruning = Classifier(optimizer), quiet()
    watch = fit(tmp_path, module, pruning, **WAYS[way])
    assert zeros(module) == round(0.8 * WEIGHTS)
    assert watch.sparsities == sorted(watch.sparsities)
    assert len(set(watch.sparsities)) > 3


@pytest.mark.parametrize("raw", [False, True], ids=["Lightning's optimizer", "raw optimizer"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_manual_optimization_with_two_optimizers(tmp_path: Path, optimizer: Any, raw: bool) -> None:
    module = ManualClassifier(optimizer=optimizer, raw=raw)
    fit(tmp_path, module, quiet())
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_manual_optimization_with_max_steps(tmp_path: Path) -> None:
    module = ManualClassifier()
    fit(tmp_path, module, quiet(), max_epochs=-1, max_steps=20)
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_a_hook_that_adds_gradient_noise_does_not_revive(tmp_path: Path) -> None:
    class Noisy(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad.add_(torch.randn_like(parameter))

    module = Noisy()
    fit(tmp_path, module, quiet())
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_dead_weights_do_not_count_in_the_clipping_norm(tmp_path: Path) -> None:
    norms = []

    class Spy(Classifier):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]))

    fit(tmp_path, Spy(), quiet(0.99, ramp=OneShotRamp(), begin=0.0, end=0.1), gradient_clip_val=1e-3)
    assert torch.stack(norms) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.9),
        lambda: EMAWeightAveraging(decay=0.9, device="cpu", update_every_n_steps=3),
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
    ],
    ids=["EMA", "EMA every 3", "SWA"],
)
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_averaged_models_are_masked_too(tmp_path: Path, average: Any, order: str) -> None:
    module, pruning, averaging = Classifier(), quiet(), average()
    callbacks = [pruning, averaging] if order == "before" else [averaging, pruning]
    saved = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, *callbacks, saved, max_epochs=6).fit(module, loader(), loader())
    assert zeros(module) == round(0.8 * WEIGHTS)
    # SWA's scheduler keeps a bound function in its state up to torch 2.7.
    state = torch.load(saved.last_model_path, weights_only=False)["state_dict"]
    assert sum(int((state[name] == 0).sum()) for name in pruning.masks) == round(0.8 * WEIGHTS)


@pytest.mark.filterwarnings("ignore")  # dynamo warns of what it meets in Lightning
def test_compiled_module(tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, torch.compile(module, backend="eager"), quiet(), max_epochs=2)
    assert zeros(module) == round(0.8 * WEIGHTS)


@pytest.mark.parametrize(
    "ramp", [OneShotRamp(), LinearRamp(), CubicRamp(), GeometricRamp(), OneCycleRamp()], ids=repr
)
@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_every_ramp_ends_exactly(tmp_path: Path, ramp: Ramp, interval: Any) -> None:
    module = Classifier()
    fit(tmp_path, module, quiet(0.777, ramp=ramp, interval=interval), max_epochs=5)
    assert zeros(module) == round(0.777 * WEIGHTS)


def test_a_ramp_that_rests_scores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, score = [], Magnitude.score
    monkeypatch.setattr(Magnitude, "score", lambda *args: scored.append(True) or score(*args))
    fit(tmp_path, module := Classifier(), quiet(ramp=OneShotRamp()))
    assert len(scored) == 1
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_the_ramp_is_followed_epoch_by_epoch(tmp_path: Path) -> None:
    watch = fit(
        tmp_path,
        Classifier(),
        quiet(0.8, ramp=LinearRamp(), interval="epoch", begin=0.2, end=0.6),
        max_epochs=10,
    )
    of_epoch = watch.sparsities[::4]
    expected = [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]
    assert of_epoch == pytest.approx([round(s * WEIGHTS) / WEIGHTS for s in expected])


def test_steps_are_optimizer_steps(tmp_path: Path) -> None:
    """8 steps in all: the window [0.5, 1] opens at step 4, which is batch 8."""
    pruning = quiet(0.5, ramp=OneShotRamp(), begin=0.5, end=1.0)
    watch = fit(tmp_path, Classifier(), pruning, accumulate_grad_batches=2)
    assert [s > 0 for s in watch.sparsities] == [False] * 8 + [True] * 8


def test_steps_under_a_gradient_accumulation_scheduler(tmp_path: Path) -> None:
    """Epochs of 4, 4, 2 and 2 steps: step 6 of 12 is the start of batch 6."""
    pruning = quiet(0.5, ramp=OneShotRamp(), begin=0.5, end=1.0)
    watch = fit(tmp_path, Classifier(), pruning, GradientAccumulationScheduler({2: 2}))
    assert [s > 0 for s in watch.sparsities] == [False] * 6 + [True] * 10


def test_max_steps_shortens_the_window(tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, module, quiet(interval="epoch", end=1.0), max_epochs=100, max_steps=10)
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_iterable_data_without_a_length(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(loader().dataset)

    data = torch.utils.data.DataLoader(Stream(), batch_size=8)
    for kwargs in ({"interval": "epoch"}, {"interval": "step", "max_steps": 12}):
        interval = kwargs.pop("interval")
        module = Classifier()
        fit(tmp_path, module, quiet(interval=interval), data=data, max_epochs=5, **kwargs)
        assert zeros(module) == round(0.8 * WEIGHTS)


def test_layer_scope(tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, module, quiet(0.7, pattern=Unstructured("layer")))
    assert zeros(module, ["net.0.weight"]) == round(0.7 * 192)
    assert zeros(module, ["net.3.weight"]) == round(0.7 * 64)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_neurons_with_their_biases(tmp_path: Path, optimizer: Any) -> None:
    module, averaging = Classifier(optimizer), EMAWeightAveraging(decay=0.9)
    fit(tmp_path, module, quiet(0.5, pattern=Neurons(), spare="last"), averaging)
    dead = (module.net[0].weight == 0).all(1)
    assert int(dead.sum()) == 8
    assert torch.equal(module.net[0].bias == 0, dead)
    assert not (module.net[3].weight == 0).any()


@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_n_by_m(tmp_path: Path, optimizer: Any) -> None:
    module = Classifier(optimizer)
    fit(tmp_path, module, quiet(0.5, pattern=NByM(2, 4)))
    for layer in (module.net[0], module.net[3]):
        assert ((layer.weight != 0).view(len(layer.weight), -1, 4).sum(-1) == 2).all()


def test_blocks(tmp_path: Path) -> None:
    module = Classifier()
    fit(tmp_path, module, quiet(0.75, pattern=Block((4, 4))))
    blocks = (module.net[0].weight != 0).view(4, 4, 3, 4).sum((1, 3))
    assert ((blocks == 0) | (blocks == 16)).all()
    assert zeros(module) == 0.75 * WEIGHTS


def test_constant_weights(tmp_path: Path) -> None:
    module = Classifier()
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.5)
    fit(tmp_path, module, quiet(0.8, ramp=OneShotRamp(), begin=0, end=0.1))
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_zero_sparsity_prunes_nothing(tmp_path: Path) -> None:
    dense, module, pruning = Classifier(), Classifier(), quiet(0.0)
    trainer(tmp_path).fit(dense, loader())
    fit(tmp_path, module, pruning)
    assert_same_state(module.state_dict(), dense.state_dict())
    assert pruning.sparsity == 0
    assert all(mask.all() for mask in pruning.masks.values())


def test_state_of_newly_pruned_weights_is_zeroed(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            sparsity = pruning.sparsity
            if sparsity > (self.seen[-1] if self.seen else 0):
                self.seen.append(sparsity)
                for name, mask in pruning.masks.items():
                    state = trainer.optimizers[0].state[dict(pl_module.named_parameters())[name]]
                    assert not state["exp_avg"][~mask].any()
                    assert (state["exp_avg_sq"][~mask] == 1).all()  # zeros would make Adam slow
                    assert (state["exp_avg_sq"][mask] < 1).all()

        seen: list[float] = []

    pruning, look = quiet(), Look()
    fit(tmp_path, Classifier(adamw), pruning, look)
    assert len(look.seen) > 3


def test_clipping_leaves_nothing_of_dead_weights_in_the_optimizer(tmp_path: Path) -> None:
    module, pruning = Classifier(adamw), quiet()
    run = trainer(tmp_path, pruning, gradient_clip_val=0.1)
    run.fit(module, loader())
    for name, mask in pruning.masks.items():
        state = run.optimizers[0].state[dict(module.named_parameters())[name]]
        assert not state["exp_avg"][~mask].any()
        assert (state["exp_avg_sq"][~mask] > 0.9).all()


def test_an_optimizer_without_the_pruned_parameters_is_fine(tmp_path: Path) -> None:
    class HeadOnly(Classifier):
        def configure_optimizers(self) -> Any:
            return sgd(self.net[3].parameters())

    module = HeadOnly()
    fit(tmp_path, module, quiet())
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_two_callbacks_share_a_module(tmp_path: Path) -> None:
    module = Classifier()
    body, head = quiet(0.9, include="net.0.*"), quiet(0.5, exclude="net.0.*")
    logger = CSVLogger(tmp_path)
    fit(tmp_path, module, body, head, logger=logger, log_every_n_steps=1)
    assert (zeros(module, ["net.0.weight"]), zeros(module, ["net.3.weight"])) == (round(0.9 * 192), 32)
    assert logged(logger)[-1] == pytest.approx((round(0.9 * 192) + 32) / WEIGHTS)


def logged(logger: CSVLogger) -> list[float]:
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [float(row["pruning/sparsity"]) for row in csv.DictReader(file) if row["pruning/sparsity"]]


def test_sparsity_is_logged_and_can_name_a_checkpoint(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    name = "{epoch}-{pruning/sparsity:.2f}"
    saved = ModelCheckpoint(tmp_path / "saved", filename=name, save_top_k=-1)
    run = trainer(tmp_path, quiet(0.8), saved, logger=logger, log_every_n_steps=1)
    run.fit(Classifier(), loader(), loader())
    values = logged(logger)
    assert values[-1] == pytest.approx(round(0.8 * WEIGHTS) / WEIGHTS)
    assert values == sorted(values)
    assert "pruning/sparsity" in run.progress_bar_metrics
    assert saved.best_model_path.endswith("epoch=3-pruning/sparsity=0.80.ckpt")


def test_the_table_is_printed_unless_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Classifier(), quiet(0.8, verbose=True))
    printed = capsys.readouterr().out
    assert "net.0.weight" in printed
    assert f"{round(0.8 * WEIGHTS)}" in printed
    fit(tmp_path, Classifier(), quiet(0.8))
    assert "net.0.weight" not in capsys.readouterr().out


def test_training_that_stops_early_says_so(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    with pytest.warns(
        UserWarning, match=r"Training ended before the pruning window closed: sparsity is 0\.\d+, the"
    ):
        fit(tmp_path, Classifier(), quiet(), Stop())


def test_fast_dev_run_goes_through_everything(tmp_path: Path) -> None:
    for interval in ("epoch", "step"):
        module = Classifier()
        fit(tmp_path, module, quiet(interval=interval), fast_dev_run=True)
        assert zeros(module) == round(0.8 * WEIGHTS)


def test_fit_again_on_a_new_module_starts_from_nothing(tmp_path: Path) -> None:
    pruning = quiet()
    fit(tmp_path, Classifier(), pruning)
    again = fit(tmp_path, module := Classifier(seed=7), pruning)
    assert again.sparsities[0] == 0
    assert zeros(module) == round(0.8 * WEIGHTS)


def test_fit_again_on_the_same_module_keeps_its_zeros(tmp_path: Path) -> None:
    pruning, module = quiet(), Classifier()
    fit(tmp_path, module, pruning)
    masks = pruning.masks
    again = fit(tmp_path, module, pruning)
    assert set(again.sparsities) == {pruning.sparsity}
    assert_same_state(pruning.masks, masks)


def test_nothing_of_the_module_is_kept_after_fit(tmp_path: Path) -> None:
    import gc
    import weakref

    pruning, module = quiet(), Classifier()
    fit(tmp_path, module, pruning)
    gone = weakref.ref(module.net[0].weight)
    del module
    gc.collect()
    assert gone() is None
    assert pruning.sparsity == round(0.8 * WEIGHTS) / WEIGHTS


def test_validate_test_and_predict_without_fit(tmp_path: Path) -> None:
    pruning = quiet()
    run = trainer(tmp_path, pruning)
    run.validate(Classifier(), loader(), verbose=False)
    run.test(Classifier(), loader(), verbose=False)
    run.predict(Classifier(), loader())
    assert (pruning.sparsity, pruning.masks) == (0.0, {})


def test_barebones(tmp_path: Path) -> None:
    module, pruning = Classifier(), quiet()
    module.log = lambda *args, **kwargs: pytest.fail("logged, though there is nothing to log to")
    module.training_step = lambda batch, batch_idx: module(batch[0]).square().mean()
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        barebones=True,
        max_epochs=4,
        callbacks=[pruning],
        default_root_dir=tmp_path,
    ).fit(module, loader())
    assert zeros(module) == round(0.8 * WEIGHTS)
