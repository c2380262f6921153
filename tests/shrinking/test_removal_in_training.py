"""`ChannelPruning(remove="now")`: training goes on as if nothing had happened, in less time."""

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
    files_of_ranks,
    loader,
    sgd,
    trainer,
)
from test_channel_pruning import Residual, images, quiet

from lightning_structopt.pruning import Taylor
from lightning_structopt.shrinking import ChannelPruning, ChannelRatio, FLOPs, load_shrunk

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.5},
}


def now(target: Any = None, **kwargs: Any) -> ChannelPruning:
    return quiet(target, **{"end": 0.5, "remove": "now", **kwargs})


@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_if_channels_were_zero(way: str, optimizer: Any, tmp_path: Path) -> None:
    masked, small = Classifier(optimizer), Classifier(optimizer)
    pruning = now()
    trainer(tmp_path, now(remove="never"), **WAYS[way]).fit(masked, loader())
    trainer(tmp_path, pruning, **WAYS[way]).fit(small, loader())
    assert (small.net[0].out_features, small.net[1].num_features, small.net[3].in_features) == (8, 8, 8)
    expected = pruning.plan.apply(masked)
    torch.testing.assert_close(dict(small.state_dict()), dict(expected.state_dict()), rtol=1e-4, atol=1e-5)


def test_of_a_residual_network(tmp_path: Path) -> None:
    masked, small, pruning = Residual(), Residual(), now(FLOPs(0.5))
    trainer(tmp_path, now(FLOPs(0.5), remove="never"), max_epochs=3).fit(masked, images())
    trainer(tmp_path, pruning, max_epochs=3).fit(small, images())
    expected = pruning.plan.apply(masked).eval()
    batch = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(small.eval()(batch), expected(batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization(raw: bool, tmp_path: Path) -> None:
    module = ManualClassifier(raw=raw, optimizer=adamw)
    run = trainer(tmp_path, now(criterion=Taylor()))
    run.fit(module, loader())
    assert run.optimizers[0].state[module.net[0].weight]["exp_avg"].shape == (8, 12)


AVERAGES = {
    "none": list,
    "EMA": lambda: [EMAWeightAveraging(decay=0.8)],
}


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_resume_equals_straight(average: str, epoch: int, tmp_path: Path) -> None:
    """Checkpoints of before the removal, of its epoch, and of after it."""

    def fit(*more: pl.Callback, ckpt: Any = None) -> pl.Trainer:
        run = trainer(tmp_path, now(), *AVERAGES[average](), *more)
        run.fit(Classifier(adamw), loader(), loader(), ckpt_path=ckpt)
        return run

    straight = fit(ModelCheckpoint(tmp_path / "saved", save_top_k=-1, filename="{epoch}"))
    resumed = fit(ckpt=tmp_path / "saved" / f"epoch={epoch}.ckpt")
    assert straight.lightning_module.net[0].out_features == 8
    assert_same_state(resumed.lightning_module.state_dict(), straight.lightning_module.state_dict())
    assert_same_state(resumed.optimizers[0].state_dict(), straight.optimizers[0].state_dict())
    small = load_shrunk(Classifier, tmp_path / "saved" / "epoch=3.ckpt").eval()
    inputs = torch.randn(5, 12)
    if average == "none":  # the checkpoint of the last epoch comes before averages become the weights
        torch.testing.assert_close(small(inputs), straight.lightning_module.eval()(inputs))


def test_averages_get_smaller_too(tmp_path: Path) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.add((len(average._average_model.module.net[0].weight), len(pl_module.net[0].weight)))

    seen: set[tuple[int, int]] = set()
    average = EMAWeightAveraging(decay=0.8)
    trainer(tmp_path, now(), average, Look()).fit(Classifier(), loader())
    assert seen == {(16, 16), (8, 8)}


def test_with_stochastic_weight_averaging(tmp_path: Path) -> None:
    module = Classifier()
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=1)
    trainer(tmp_path, now(), average).fit(module, loader())
    assert module(torch.randn(3, 12)).isfinite().all()
    assert module.net[0].out_features == 8


def test_a_checkpoint_is_validated_with_the_callback(tmp_path: Path) -> None:
    run = trainer(tmp_path, now())
    module = Classifier()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    expected = run.validate(module, loader(), verbose=False)
    fresh = Classifier(seed=9)
    found = trainer(tmp_path, now()).validate(
        fresh, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert found == expected
    assert fresh.net[0].out_features == 8
    assert not fresh._load_state_dict_pre_hooks


def test_fit_goes_on_with_the_smaller_module(tmp_path: Path) -> None:
    module, pruning = Classifier(), now()
    trainer(tmp_path, pruning).fit(module, loader())
    trainer(tmp_path, pruning).fit(module, loader())
    assert module.net[0].out_features == 8


def test_a_strategy_that_can_not_is_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class Other(SingleDeviceStrategy):
        pass

    run = trainer(tmp_path, now(), strategy=Other("cpu"))
    with pytest.raises(
        ValueError, match='works on one device and under `ddp`. Found `Other`. Give `remove="end"`'
    ):
        run.fit(Classifier(), loader())


class TestOfCheckpoints:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        run = trainer(tmp_path, now())
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    def test_for_other_sizes(self, path: Path) -> None:
        with pytest.raises((ValueError, RuntimeError), match="net.0.weight"):
            load_shrunk(Classifier, path, hidden=20)

    def test_for_another_class(self, path: Path) -> None:
        with pytest.raises(
            ValueError, match="A plan fits the class that it was made for, `support.Classifier`"
        ):
            load_shrunk(ManualClassifier, path)

    def test_without_a_plan(self, path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["callbacks"] = {}
        torch.save(checkpoint, path)
        with pytest.raises(
            ValueError, match="saved by a training with `ChannelPruning`, after its window closed"
        ):
            load_shrunk(Classifier, path)


def of_two_ranks(rank: int, root: Path) -> None:
    for remove in ("end", "now"):
        module = Classifier(adamw)
        pruning = ChannelPruning(
            ChannelRatio(0.5), interval="step", end=0.5, remove=remove, verbose=rank == 0, criterion=Taylor()
        )
        run = trainer(root, pruning, strategy="ddp", devices=2, max_epochs=6)
        run.fit(module, loader())
        small = pruning.shrunk if remove == "end" else module
        torch.save(
            {"whole": module.state_dict(), "small": small.state_dict(), "plan": pruning.plan.as_data()},
            root / f"{remove}-{rank}.pt",
        )
    try:
        strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        trainer(root, quiet(), strategy=strategy, devices=2).fit(Sharded(), loader())
    except ValueError as error:
        (root / f"refused-{rank}.txt").write_text(str(error))


root = files_of_ranks(of_two_ranks)


class TestOfTwoRanks:
    @pytest.mark.parametrize("remove", ["end", "now"])
    def test_agree(self, root: Path, remove: str) -> None:
        zero, one = (torch.load(root / f"{remove}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert zero["plan"] == one["plan"]
        parameters = [name for name, _ in Classifier().named_parameters()]
        for state in ("whole", "small"):  # statistics of batch norm are each rank's own
            assert_same_state({n: zero[state][n] for n in parameters}, {n: one[state][n] for n in parameters})
        assert zero["small"]["net.0.weight"].shape == (8, 12)
        assert len(zero["whole"]["net.0.weight"]) == (16 if remove == "end" else 8)

    def test_train_alike_with_channels_zero_and_removed(self, root: Path) -> None:
        end, gone = (torch.load(root / f"{remove}-0.pt", weights_only=True) for remove in ("end", "now"))
        torch.testing.assert_close(gone["small"], end["small"], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_shards_are_refused(self, root: Path, rank: int) -> None:
        assert (
            "must be whole on every rank. Found `ModelParallelStrategy` (FSDP2)"
            in (root / f"refused-{rank}.txt").read_text()
        )
