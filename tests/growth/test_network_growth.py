"""`NetworkGrowth` in real training: grows when it shall, and nothing else changes."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from support import (
    Classifier,
    ManualClassifier,
    Sharded,
    adamw,
    assert_same_state,
    dataset,
    files_of_ranks,
    loader,
    sgd,
    trainer,
)
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_structopt.growth import Deepen, GrowthPlan, NetworkGrowth, Plateau, Widen, load_grown
from lightning_structopt.lr_decay import LRDecay
from lightning_structopt.pruning import IterativePruning
from lightning_structopt.schedules import Linear
from lightning_structopt.shrinking import ChannelPruning, ChannelRatio

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def growth(when: Any = None, **kwargs: Any) -> NetworkGrowth:
    steps = (
        kwargs if {"widen", "deepen"} & kwargs.keys() else {"widen": Widen(1.5), "deepen": Deepen(), **kwargs}
    )
    return NetworkGrowth([1, 3] if when is None else when, **{"verbose": False, **steps})


def fit(root: Path, module: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    ckpt = kwargs.pop("ckpt", None)
    run = trainer(root, *callbacks, **kwargs)
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


class Widths(pl.Callback):
    """Records the width at the start and end of each epoch's first batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.seen.append(module.net[0].out_features)


def test_grows_at_its_epochs(tmp_path: Path) -> None:
    widths, callback, module = Widths(), growth(), Classifier(adamw)
    fit(tmp_path, module, callback, widths)
    assert widths.seen == [16, 24, 24, 36]
    assert callback.times == 2
    assert isinstance(module.net[2], nn.Sequential)
    assert len(callback.plan.steps) == 4


def test_the_function_is_kept(tmp_path: Path) -> None:
    class Compare(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            self.before = copy.deepcopy(module)

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                for training in (False, True):
                    modules = [copy.deepcopy(each).train(training) for each in (self.before, module)]
                    torch.testing.assert_close(
                        modules[1](batch[0]), modules[0](batch[0]), rtol=1e-5, atol=1e-6
                    )
                    compared.append(training)

    compared: list[bool] = []
    fit(tmp_path, Classifier(adamw), growth(), Compare())
    assert len(compared) == 8


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_new_weights_are_trained(optimizer: Any, tmp_path: Path) -> None:
    module = Classifier(optimizer)
    run = fit(tmp_path, module, growth())
    owned = {id(each) for group in run.optimizers[0].param_groups for each in group["params"]}
    assert owned == {id(each) for each in module.parameters()}
    new = module.net[2][1][0].weight
    assert not torch.equal(new, torch.eye(len(new)))
    assert run.optimizers[0].state[module.net[0].weight].keys()


class TestPlateau:
    class Scripted(Classifier):
        """Logs what it is told."""

        def __init__(self, values: list[float], where: str) -> None:
            super().__init__(adamw)
            self.values, self.where = values, where

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.where == "train":
                self.log("metric", self.values[self.current_epoch], on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.where == "val":
                self.log("metric", self.values[self.current_epoch])

    @pytest.mark.parametrize("where", ["train", "val"])
    @pytest.mark.parametrize(
        ("plateau", "values", "expected"),
        [
            (Plateau("metric", patience=2), [5, 4, 4, 4, 4, 4, 4, 4], [4]),
            (Plateau("metric", patience=2, times=2), [5, 4, 4, 4, 4, 4, 4, 4], [4, 6]),
            (Plateau("metric", patience=2, min_delta=0.5), [5, 4.6, 4.5, 4.4, 3, 3, 3, 3], [3]),
            (Plateau("metric", mode="max", patience=1), [1, 2, 3, 3, 4, 5, 6, 7], [4]),
            (Plateau("metric", patience=3), [5, 4, 3, 2, 1, 0, -1, -2], []),
            (Plateau("metric", patience=1), [5, float("nan"), 4, 3, 2, 1, 0, 0], [2]),
        ],
        ids=["once", "twice", "delta", "max", "improving", "nan"],
    )
    def test_grows_after_it(
        self, where: str, plateau: Plateau, values: list[float], expected: list[int], tmp_path: Path
    ) -> None:
        callback = growth(plateau, widen=Widen(1.5))
        fit(tmp_path, self.Scripted(values, where), callback, max_epochs=8)
        assert callback.state_dict()["grown_at"] == expected

    def test_counts_epochs_with_validation(self, tmp_path: Path) -> None:
        callback = growth(Plateau("metric", patience=1), widen=Widen(1.5))
        module = self.Scripted([1.0] * 8, "val")
        fit(tmp_path, module, callback, max_epochs=8, check_val_every_n_epoch=2)
        assert callback.state_dict()["grown_at"] == [4]

    def test_takes_the_last_of_several_validations(self, tmp_path: Path) -> None:
        callback = growth(Plateau("metric", patience=1), widen=Widen(1.5))
        fit(tmp_path, self.Scripted([3, 2, 1, 1], "val"), callback, val_check_interval=2)
        assert callback.times == 0  # at the start of an epoch that there isn't any more

    def test_a_metric_that_is_not_logged(self, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match="Found no `val_loss` after an epoch; there are `train_loss`, `val_acc`"
        ):
            fit(tmp_path, Classifier(adamw), growth(Plateau("val_loss")))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.5},
    "bf16": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    known = list(parameters)
    decay, rest = [p for p in known if p.ndim > 1], [p for p in known if p.ndim < 2]
    return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)


class TestResume:
    @pytest.mark.parametrize("epoch", [0, 1, 2])
    @pytest.mark.parametrize("average", [False, True], ids=["plain", "EMA"])
    @pytest.mark.parametrize("optimizer", [sgd, adamw, two_groups], ids=["sgd", "adamw", "two_groups"])
    def test_equals_straight(self, optimizer: Any, average: bool, epoch: int, tmp_path: Path) -> None:
        """Checkpoints of before the first growth, of after it, and of before the second."""

        def run(*more: pl.Callback, ckpt: Any = None) -> pl.Trainer:
            averages = [EMAWeightAveraging(decay=0.8)] if average else []
            return fit(
                tmp_path,
                Classifier(optimizer),
                growth(),
                LRDecay(Linear(end=0.1)),
                *averages,
                *more,
                ckpt=ckpt,
            )

        straight = run(ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}"))
        resumed = run(ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
        assert straight.lightning_module.net[0].out_features == 36
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
        assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
        assert resumed.callbacks[0].plan == straight.callbacks[0].plan

    @pytest.mark.parametrize("early", [True, False], ids=["validation end", "epoch end"])
    def test_of_a_plateau(self, early: bool, tmp_path: Path) -> None:
        def run(*more: pl.Callback, ckpt: Any = None) -> pl.Trainer:
            plateau = Plateau("val_acc", mode="max", patience=1, min_delta=0.2, times=2)
            return fit(tmp_path, Classifier(adamw), growth(plateau), *more, ckpt=ckpt, max_epochs=6)

        saved = ModelCheckpoint(
            tmp_path / "saved",
            save_top_k=-1,
            monitor="val_acc",
            filename="{epoch}",
            save_on_train_epoch_end=not early,
        )
        straight = run(saved)
        assert straight.callbacks[0].times == 2
        for epoch in range(5):
            resumed = run(ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
            assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
            assert (
                resumed.callbacks[0].state_dict()["grown_at"]
                == straight.callbacks[0].state_dict()["grown_at"]
            )

    @pytest.mark.parametrize("step", [3, 6, 13])
    def test_in_the_middle_of_an_epoch(self, step: int, tmp_path: Path) -> None:
        def run(*more: pl.Callback, ckpt: Any = None) -> pl.Trainer:
            result = trainer(tmp_path, growth(), *more)
            result.fit(Classifier(adamw), StatefulDataLoader(dataset(), batch_size=8), ckpt_path=ckpt)
            return result

        straight = run(
            ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=1, filename="{step}")
        )
        resumed = run(ckpt=tmp_path / "saved" / f"step={step}.ckpt")
        assert straight.lightning_module.net[0].out_features == 36
        assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())

    def test_other_parameters_are_an_error(self, tmp_path: Path) -> None:
        class Chosen(Classifier):
            def configure_optimizers(self) -> Any:
                known = {
                    "net.0.weight",
                    "net.0.bias",
                    "net.3.weight",
                    "net.3.bias",
                    "net.1.weight",
                    "net.1.bias",
                }
                return adamw([p for n, p in self.named_parameters() if n in known])

        saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
        fit(tmp_path, Chosen(), growth(), saved)
        with pytest.raises(ValueError, match="must have the parameters that they had"):
            fit(tmp_path, Chosen(), growth(), ckpt=saved.last_model_path, max_epochs=5)


@pytest.mark.parametrize("way", WAYS)
def test_works_with(way: str, tmp_path: Path) -> None:
    module = Classifier(adamw)
    fit(tmp_path, module, growth(), **WAYS[way])
    assert module.net[0].out_features == 36


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization(raw: bool, tmp_path: Path) -> None:
    module = ManualClassifier(raw=raw, optimizer=adamw)
    run = fit(tmp_path, module, growth())
    assert run.optimizers[0].state[module.net[0].weight]["exp_avg"].shape == (36, 12)
    assert any(each is module.net[2][1][0].weight for each in run.optimizers[0].param_groups[0]["params"])


class TestAverages:
    def test_grow_too(self, tmp_path: Path) -> None:
        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
                seen.add((len(average._average_model.module.net[0].weight), len(module.net[0].weight)))

        seen: set[tuple[int, int]] = set()
        average = EMAWeightAveraging(decay=0.8)
        fit(tmp_path, Classifier(adamw), growth(), average, Look())
        assert seen == {(16, 16), (24, 24), (36, 36)}

    def test_of_stochastic_weight_averaging(self, tmp_path: Path) -> None:
        module = Classifier(sgd)
        average = StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)
        fit(tmp_path, module, growth(), average)
        assert module(torch.randn(3, 12)).isfinite().all()


class TestCheckpoints:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        self.module, self.callback = Classifier(adamw), growth()
        fit(tmp_path, self.module, self.callback).save_checkpoint(tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    def test_load_as_large_as_they_were(self, path: Path) -> None:
        grown = load_grown(Classifier, path)
        assert_same_state(dict(grown.state_dict()), dict(self.module.state_dict()))
        assert grown.net[0].out_features == 36

    def test_hold_a_plan_that_makes_the_module(self, path: Path, tmp_path: Path) -> None:
        self.callback.plan.save(tmp_path / "plan.json")
        assert json.loads((tmp_path / "plan.json").read_text())["module_class"] == "support.Classifier"
        plan = GrowthPlan.load(tmp_path / "plan.json")
        grown = plan.apply(Classifier())
        grown.load_state_dict(self.module.state_dict())
        assert plan == self.callback.plan

    def test_are_validated_with_the_callback(self, path: Path, tmp_path: Path) -> None:
        expected = trainer(tmp_path).validate(self.module, loader(), verbose=False)
        fresh = Classifier(seed=9)
        found = trainer(tmp_path, growth()).validate(fresh, loader(), ckpt_path=path, verbose=False)
        assert found == expected
        assert not fresh._load_state_dict_pre_hooks

    def test_of_before_growth_load_too(self, tmp_path: Path) -> None:
        saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
        fit(tmp_path, Classifier(adamw), growth(), saved)
        assert load_grown(Classifier, tmp_path / "saved" / "epoch=0.ckpt").net[0].out_features == 16
        Classifier.load_from_checkpoint(tmp_path / "saved" / "epoch=0.ckpt")

    def test_of_before_growth_into_what_has_grown(self, tmp_path: Path) -> None:
        saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
        module = Classifier(adamw)
        run = fit(tmp_path, module, growth(), saved)
        with pytest.raises(
            ValueError, match="loads into a module that has grown no further. Found `net.0.weight`"
        ):
            run.validate(module, loader(), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")

    def test_of_after_growth_into_what_has_grown_a_little(self, tmp_path: Path) -> None:
        saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}")
        fit(tmp_path, Classifier(adamw), growth(), saved)
        little = load_grown(Classifier, tmp_path / "saved" / "epoch=1.ckpt")
        trainer(tmp_path, growth()).validate(little, loader(), ckpt_path=tmp_path / "saved" / "epoch=3.ckpt")
        assert little.net[0].out_features == 36

    def test_of_another_training(self, tmp_path: Path) -> None:
        fit(tmp_path, Classifier(adamw)).save_checkpoint(tmp_path / "last.ckpt")
        with pytest.raises(
            ValueError, match="saved by a training with `NetworkGrowth`. Found none of its plans"
        ):
            load_grown(Classifier, tmp_path / "last.ckpt")

    def test_of_another_class(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match="A plan fits the class that it was made for, `support.Classifier`"
        ):
            load_grown(ManualClassifier, path)

    def test_of_other_sizes(self, path: Path) -> None:
        with pytest.raises(ValueError, match="A widening fits modules of the sizes that it was made for"):
            load_grown(Classifier, path, hidden=20)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "match"),
        [
            ({"when": "val_loss"}, TypeError, "`when` must be a `Plateau` or a list of epochs"),
            ({"when": []}, ValueError, r"`when` must have epochs, each once. Found `when = \[\]`"),
            ({"when": [2, 2]}, ValueError, r"each once. Found `when = \[2, 2\]`"),
            ({"when": [0]}, ValueError, "`when` must be at least 1"),
            ({"when": [1], "widen": None}, ValueError, "needs `widen` or `deepen`, or both"),
            ({"when": [1], "widen": 2.0}, TypeError, "`widen` must be a `Widen`. Found `widen = 2.0`"),
            ({"when": [1], "deepen": Deepen}, TypeError, r"Did you mean `Deepen\(\)`"),
            ({"when": [1], "max_parameters": 0}, ValueError, "`max_parameters` must be at least 1"),
        ],
    )
    def test_arguments(self, arguments: dict[str, Any], error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            NetworkGrowth(**{"widen": Widen(1.5), **arguments})

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"patience": 0}, "`patience` must be at least 1"),
            ({"mode": "least"}, "`mode` must be 'min' or 'max'"),
            ({"min_delta": -1.0}, "`min_delta` must be in"),
            ({"times": 0}, "`times` must be at least 1"),
        ],
    )
    def test_plateau(self, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Plateau("val_loss", **arguments)

    @pytest.mark.parametrize(
        "other", [IterativePruning(0.5), ChannelPruning(ChannelRatio(0.5))], ids=["i", "c"]
    )
    def test_pruning_beside_it(self, other: pl.Callback, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match="must keep its shape while it is pruned. Found `NetworkGrowth` with"
        ):
            fit(tmp_path, Classifier(adamw), growth(), other)

    def test_an_optimizer_of_another_kind(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="Found `LBFGS`, which keeps all in one"):
            fit(tmp_path, Classifier(torch.optim.LBFGS), growth())

    def test_a_compiled_module(self, tmp_path: Path) -> None:
        module = Classifier(adamw)
        module.net = torch.compile(module.net)
        with pytest.raises(
            ValueError, match="A compiled module keeps its shapes. Found that .* applied to `net`"
        ):
            fit(tmp_path, module, growth())

    @pytest.mark.parametrize(
        ("step", "match"),
        [
            ({"widen": Widen(2.0, "net.7")}, r"Found `name = 'net.7'`. Near it: 'net.\d'"),
            ({"deepen": Deepen("net.3")}, "An identity layer keeps the function next to an activation"),
        ],
        ids=["widen", "deepen"],
    )
    def test_growth_that_can_not_work_is_known_before_the_first_step(
        self, step: dict[str, Any], match: str, tmp_path: Path
    ) -> None:
        module = Classifier(adamw)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=match):
            fit(tmp_path, module, growth([3], **step))
        assert_same_state(dict(module.state_dict()), dict(before))


def test_ends_at_a_number_of_parameters(tmp_path: Path) -> None:
    module, callback = Classifier(adamw), growth([1, 2, 3], widen=Widen(2.0), max_parameters=700)
    with pytest.warns(UserWarning, match="Growth ends here: from 612 parameters it would go to 1,220, above"):
        fit(tmp_path, module, callback)
    assert module.net[0].out_features == 32
    assert callback.times == 1


def test_draws_no_numbers_of_the_training(tmp_path: Path) -> None:
    class Draws(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            drawn.append(torch.get_rng_state())

    draws = []
    for callbacks in ([], [growth(deepen=Deepen(kind="residual"), widen=Widen(1.5))]):
        drawn: list[Tensor] = []
        torch.manual_seed(5)
        fit(tmp_path, Classifier(adamw), *callbacks, Draws())
        draws.append(drawn)
    assert_same_state(*draws)


class TestAgain:
    def test_with_a_fresh_module(self, tmp_path: Path) -> None:
        callback = growth()
        first, second = Classifier(adamw), Classifier(adamw)
        fit(tmp_path, first, callback)
        fit(tmp_path, second, callback)
        assert_same_state(dict(second.state_dict()), dict(first.state_dict()))

    def test_with_the_grown_module(self, tmp_path: Path) -> None:
        callback, module = growth(), Classifier(adamw)
        fit(tmp_path, module, callback)
        fit(tmp_path, module, callback)
        assert module.net[0].out_features == 36
        assert callback.times == 2

    def test_after_an_exception(self, tmp_path: Path) -> None:
        class Crash(pl.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 7:
                    raise RuntimeError("crash")

        callback, again, straight = growth(), Classifier(adamw), Classifier(adamw)
        with pytest.raises(RuntimeError, match="crash"):
            fit(tmp_path, Classifier(adamw), callback, Crash())
        fit(tmp_path, again, callback)
        fit(tmp_path, straight, growth())
        assert_same_state(dict(again.state_dict()), dict(straight.state_dict()))

    def test_pickled_and_copied(self, tmp_path: Path) -> None:
        used = growth()
        fit(tmp_path, Classifier(adamw), used)
        for callback in (growth(), used):
            for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
                assert repr(twin) == repr(callback)
                assert_same_state(twin.state_dict(), callback.state_dict())
                fit(tmp_path, Classifier(adamw), twin)

    @pytest.mark.parametrize(
        "when", [[1, 3], Plateau("val_acc", "max", 2, 0.1, 3)], ids=["epochs", "plateau"]
    )
    def test_repr_round_trips(self, when: Any) -> None:
        callback = growth(when, widen=Widen(1.5, "net"), deepen=Deepen("net.2"), max_parameters=9)
        names = {each.__name__: each for each in (NetworkGrowth, Plateau, Widen, Deepen)}
        assert repr(eval(repr(callback), names)) == repr(callback)


def test_says_that_it_grew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Classifier(adamw), growth([1], widen=Widen(2.0), verbose=True))
    assert "Epoch 1: grown from 308 to 612 parameters." in capsys.readouterr().out


def of_two_ranks(rank: int, root: Path) -> None:
    module, callback = Classifier(adamw), growth()
    fit(root, module, callback, strategy="ddp", devices=2)
    torch.save({"state": module.state_dict(), "plan": callback.plan.as_data()}, root / f"{rank}.pt")
    try:
        strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        fit(root, Sharded(adamw), growth(), strategy=strategy, devices=2)
    except ValueError as error:
        (root / f"refused-{rank}.txt").write_text(str(error))


root = files_of_ranks(of_two_ranks)


class TestOfTwoRanks:
    def test_grow_alike(self, root: Path) -> None:
        zero, one = (torch.load(root / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        assert zero["plan"] == one["plan"]
        assert zero["state"]["net.0.weight"].shape == (36, 12)
        trained = GrowthPlan.from_data(zero["plan"]).apply(Classifier())
        names = [name for name, _ in trained.named_parameters()]
        # Statistics of batch norm are each rank's own.
        assert_same_state({n: zero["state"][n] for n in names}, {n: one["state"][n] for n in names})

    @pytest.mark.parametrize("rank", [0, 1])
    def test_shards_are_refused(self, root: Path, rank: int) -> None:
        assert (
            "on one device and under `ddp`. Found `ModelParallelStrategy`"
            in (root / f"refused-{rank}.txt").read_text()
        )
