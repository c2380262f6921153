"""Members that are trained by a sweep: what they differ in, kills, failures, and folds for a combiner."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from support import CLASSES, Classifier, adamw, dataset, loader
from test_sweep_interrupted import announced, drive, fifo, wait_gone
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_structopt import MixedEnsemble, ParallelEnsemble, gather_out_of_fold, train_members
from lightning_structopt._folds import deal
from lightning_structopt.sweep import (
    Bootstrap,
    CandidateResult,
    Fold,
    InProcess,
    LocalProcesses,
    MemberFailedError,
)


class Fresh(Classifier):
    """Its weights are drawn from whatever seed there is, and it remembers the samples that it saw."""

    def __init__(self, hidden: int = 8) -> None:
        seed = int(torch.randint(2**31, ()))
        super().__init__(adamw, hidden, seed)
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("checked", torch.zeros(0))
        self._register_load_state_dict_pre_hook(self._resize)

    def _resize(self, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        self.seen, self.checked = state[f"{prefix}seen"].clone(), state[f"{prefix}checked"].clone()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen = torch.cat([self.seen, batch[0][:, 0]])
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.checked = torch.cat([self.checked, batch[0][:, 0]])
        super().validation_step(batch, batch_idx)


def trained(
    folder: Path, count: int = 3, make: Any = Fresh, data: Any = None, **options: Any
) -> list[CandidateResult]:
    defaults = {
        "epochs": 1,
        "monitor": "val_acc",
        "val_dataloaders": loader() if data is None else None,
        "trainer": {"accelerator": "cpu"},
        "executor": InProcess(),
        "directory": folder / "members",
        "progress": False,
    }
    return train_members(make, loader(shuffle=True) if data is None else data, count, **(defaults | options))


def weights(member: CandidateResult) -> Tensor:
    return torch.cat([value.flatten() for value in member.load().parameters()])


def test_members_differ_in_their_seeds_alone(tmp_path: Path) -> None:
    members = trained(tmp_path / "one", seed=4)
    assert [member.name for member in members] == ["member-0", "member-1", "member-2"]
    assert all(0 <= (member.score or -1) <= 1 for member in members)
    found = [weights(member) for member in members]
    assert not any(torch.equal(found[a], found[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert all(len(member.load().seen) == 32 for member in members)
    # The seeds go on from one another, so one may add members later.
    assert torch.equal(weights(trained(tmp_path / "two", count=2, seed=5)[0]), found[1])
    ensemble = ParallelEnsemble(members)
    assert ensemble(torch.randn(5, 12)).shape == (5, CLASSES)


def test_bootstrap_samples_are_drawn_for_each(tmp_path: Path) -> None:
    values = dataset().tensors[0][:, 0]
    for index, member in enumerate(trained(tmp_path, vary="bootstrap")):
        drawn = Bootstrap(index).train(32)
        assert 10 < len(set(drawn)) < 32
        module = member.load()
        assert torch.equal(module.seen.sort().values, values[drawn].sort().values)
        assert not torch.equal(module.seen, values[drawn])  # but shuffled
        assert torch.equal(module.checked, values)  # all of the validation data


class Module(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.data = dataset()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, 5, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return loader()


@pytest.mark.parametrize("as_module", [True, False])
def test_folds_are_held_out(as_module: bool, tmp_path: Path) -> None:
    values = dataset().tensors[0][:, 0]
    members = trained(tmp_path, count=4, vary="fold", seed=2, data=Module() if as_module else None)
    for member, part in zip(members, deal(32, 4, seed=2), strict=True):
        module = member.load()
        assert torch.equal(module.checked, values[part])
        rest = sorted(set(values.tolist()) - set(values[part].tolist()))
        if as_module:
            assert len(module.seen) == 20  # the last batch is dropped, as by the loader that was given
            assert set(module.seen.tolist()) <= set(rest)
        else:
            assert module.seen.sort().values.tolist() == rest


def test_folds_feed_a_combiner(tmp_path: Path) -> None:
    kinds = [
        trained(tmp_path / str(hidden), count=4, make=lambda h=hidden: Fresh(h), vary="fold", seed=3)
        for hidden in (8, 2)
    ]
    found = gather_out_of_fold(kinds, dataset(), seed=3)
    inputs, _ = dataset().tensors
    for index, part in enumerate(deal(32, 4, seed=3)):
        for kind in range(2):
            own = kinds[kind][index].load()
            torch.testing.assert_close(found.outputs[kind, part], own(inputs[part]).detach())
    stack = MixedEnsemble(
        [ParallelEnsemble(folds) for folds in found.members], nn.Linear(2 * CLASSES, CLASSES)
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(stack, DataLoader(found, 8))


@pytest.mark.parametrize("lengths", [[], [2, 3], [1, 1]])
def test_folds_that_do_not_fit(lengths: list[int]) -> None:
    members = [[nn.Linear(12, 4)] * length for length in lengths]
    with pytest.raises(ValueError, match="Each kind needs one member for each of two folds or more"):
        gather_out_of_fold(members, dataset())


class Announces(Fresh):
    """Tells through a named pipe that it hangs, where it is the second member, while the pipe is there."""

    def __init__(self, pipe: Path) -> None:
        super().__init__()
        self.pipe = pipe

    def on_train_epoch_start(self) -> None:
        if "member-1" in self.trainer.default_root_dir and self.current_epoch == 1 and self.pipe.exists():
            with self.pipe.open("w") as pipe:
                pipe.write(f"{os.getpid()}\n")
            signal.pause()


class Call:
    """A call of `train_members`, run as the script of another test file runs sweeps."""

    def __init__(self, folder: Path, pipe: Path) -> None:
        self.folder, self.pipe = folder, pipe

    def run(self, *loaders: Any) -> list[CandidateResult]:
        options = {"epochs": 2, "executor": LocalProcesses(workers=2), "vary": "bootstrap"}
        return trained(self.folder, make=lambda: Announces(self.pipe), **options)


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    pipe = fifo(tmp_path / "run")
    arguments = f"Path({str(tmp_path / 'run')!r}), Path({str(pipe)!r})"
    driver = drive(tmp_path / "drive.py", "test_members", "Call", arguments, "")
    hanging = announced(pipe)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait(timeout=60)
    wait_gone(hanging)
    pipe.unlink()
    members = Call(tmp_path / "run", pipe).run()
    straight = Call(tmp_path / "straight", pipe).run()
    for member, other in zip(members, straight, strict=True):
        assert torch.equal(weights(member), weights(other))
        assert torch.equal(member.load().seen, other.load().seen)


class Fails(Fresh):
    def on_train_start(self) -> None:
        if "member-1" in self.trainer.default_root_dir:
            raise RuntimeError("no luck")


def test_members_that_fail_are_named_and_the_others_kept(tmp_path: Path) -> None:
    with pytest.raises(MemberFailedError, match="did not: member-1: failed: RuntimeError: no luck") as caught:
        trained(tmp_path, make=Fails)
    assert [member.name for member in caught.value.trained] == ["member-0", "member-2"]
    assert caught.value.trained[1].load().training is False


def test_members_that_are_all_alike_are_said_to_be(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Members should differ.* look for `manual_seed`"):
        trained(tmp_path, make=Classifier, data=loader(), val_dataloaders=loader())


def test_another_call_in_the_same_directory(tmp_path: Path) -> None:
    trained(tmp_path, count=2)
    with pytest.raises(ValueError, match="'member-0' has changed"):
        trained(tmp_path, count=2, vary="bootstrap")
    with pytest.raises(ValueError, match="'member-2' is new"):
        trained(tmp_path, count=3)


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(dataset())


LOADERS = {
    "a list": ([1, 2], TypeError, "one training `DataLoader` .* Found a `list`"),
    "no length": (DataLoader(Endless()), TypeError, "Found a `DataLoader` over a `Endless`"),
    "a sampler": (
        loader(sampler=WeightedRandomSampler([1.0] * 32, 32)), ValueError, "Found a `WeightedRandomSampler`"
    ),
    "batches": (
        DataLoader(dataset(), batch_sampler=BatchSampler(SequentialSampler(dataset()), 4, False)),
        ValueError, "Found a `BatchSampler`",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "kind", "message"), LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("part", [Fold(0, 2), Bootstrap()], ids=["fold", "bootstrap"])
def test_loaders_that_can_not_be_parted(part: Any, data: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        part((data, None))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Fold(2, 2), ValueError, r"`index` must be in \[0, folds\)"),
        (lambda: Fold(0, 1), ValueError, "`folds` must be"),
        (lambda: Fold(0, 5).train(4), ValueError, "a sample for each fold. Found 4 samples for 5 folds"),
        (lambda: Bootstrap(-1), ValueError, "`seed` must be"),
        (lambda: trained(Path(), count=1, vary="fold"), ValueError, "`count` must be"),
        (lambda: trained(Path(), count=0), ValueError, "`count` must be"),
        (lambda: trained(Path(), vary="weather"), ValueError, "`vary` must be"),
        (lambda: trained(Path(), seed=-1), ValueError, "`seed` must be"),
    ],
)
def test_bad_values(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
