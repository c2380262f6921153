"""With a cache the teacher runs once for each sample, and the student becomes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from students import a_teacher
from support import Classifier, adamw, assert_same_state, dataset, loader, trainer
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_structopt.distillation import DistillationModule, EMATeacher
from lightning_structopt.distillation.cache.sample_ids import WithIds
from lightning_structopt.distillation.cache.teacher_cache import TeacherCache
from lightning_structopt.distillation.losses.features import Hint
from lightning_structopt.distillation.losses.logits import SoftTarget


def losses() -> dict[Any, Any]:
    return {"logits": SoftTarget(), ("net.0", "net.0"): (0.5, Hint())}


def train(
    root: Path, cache: Any, data: Any = None, shuffle: bool = False, teacher: Any = None, **kwargs: Any
) -> Any:
    teacher = a_teacher() if teacher is None else teacher
    runs: list[int] = []
    teacher.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    student = Classifier(adamw)
    module = DistillationModule(teacher, student, losses(), cache=cache, **kwargs)
    numbered = WithIds(dataset()) if data is None else data
    shuffled = torch.Generator().manual_seed(0)
    run = trainer(root)
    run.fit(module, DataLoader(numbered, 8, shuffle=shuffle, generator=shuffled), loader())
    return student.state_dict(), runs


@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_the_student_is_the_same_and_the_teacher_runs_once(shuffle: bool, tmp_path: Path) -> None:
    live, every = train(tmp_path, None, shuffle=shuffle)
    cached, once = train(tmp_path, TeacherCache(tmp_path / "cache", torch.float32), shuffle=shuffle)
    if shuffle:  # the teacher's sums depend on which samples come together
        torch.testing.assert_close(cached, live)
    else:
        assert_same_state(cached, live)
    assert len(every) == 16
    assert len(once) == 4 + 3  # the first epoch, and one batch of each other to compare with
    again, checks = train(tmp_path, TeacherCache(tmp_path / "cache", torch.float32), shuffle=shuffle)
    assert len(checks) == 4
    torch.testing.assert_close(again, live)


def test_half_precision_is_close(tmp_path: Path) -> None:
    live, _ = train(tmp_path, None)
    cached, _ = train(tmp_path, TeacherCache(tmp_path / "cache"))
    torch.testing.assert_close(cached, live, rtol=0.05, atol=5e-3)


@pytest.mark.parametrize("arguments", [{}, {"top_k": 2}], ids=str)
def test_a_student_learns_the_same_whether_the_cache_was_there_or_not(arguments: Any, tmp_path: Path) -> None:
    # So does one that was killed in its first epoch and goes on.
    first, _ = train(tmp_path, TeacherCache(tmp_path / "cache", **arguments))
    again, _ = train(tmp_path, TeacherCache(tmp_path / "cache", **arguments))
    assert_same_state(again, first)


def test_the_student_sees_batches_as_without_numbers(tmp_path: Path) -> None:
    class Unpacks(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert type(batch) in {list, tuple}
            assert len(batch) == 2

    numbered = DataLoader(WithIds(dataset()), 8)
    cache = TeacherCache(tmp_path / "cache")
    trainer(tmp_path).fit(DistillationModule(a_teacher(), Unpacks(), cache=cache), numbered, numbered)


def test_a_cache_of_another_teacher(tmp_path: Path) -> None:
    train(tmp_path, TeacherCache(tmp_path / "cache"))
    with pytest.raises(ValueError, match="A cache belongs to one teacher"):
        train(tmp_path, TeacherCache(tmp_path / "cache"), teacher=Classifier(hidden=24, seed=8))


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        inputs, label = dataset()[index]
        return inputs + torch.randn_like(inputs), label


def test_random_augmentation_is_refused_unless_it_is_seeded(tmp_path: Path) -> None:
    for data in (WithIds(Noisy()), Subset(WithIds(Noisy()), range(32))):
        with pytest.raises(ValueError, match="random augmentation"):
            train(tmp_path, TeacherCache(tmp_path / "cache"), data)
    train(tmp_path, TeacherCache(tmp_path / "cache"), WithIds(Noisy(), seed=0))


def test_what_changes_after_the_check_is_caught_in_the_next_epoch(tmp_path: Path) -> None:
    """As where a data module augments on the device."""

    class Augmenting(Classifier):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + torch.randn_like(batch[0]), batch[1]

    module = DistillationModule(a_teacher(), Augmenting(), cache=TeacherCache(tmp_path / "cache"))
    with pytest.raises(ValueError, match="random augmentation"):
        trainer(tmp_path).fit(module, DataLoader(WithIds(dataset()), 8))


def test_batches_without_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A cache finds samples by number. Found a batch without"):
        train(tmp_path, TeacherCache(tmp_path / "cache"), dataset())


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"cache": "outputs"}, TypeError, "`cache` must be a `TeacherCache`"),
        ({"teacher": EMATeacher()}, ValueError, "Found an `EMATeacher`, which changes"),
        ({"shard_teacher": True}, ValueError, "Found `shard_teacher=True` and a `cache`"),
    ],
    ids=["path", "average", "shards"],
)
def test_what_does_not_go_with_a_cache(arguments: Any, kind: Any, message: str, tmp_path: Path) -> None:
    given = {"teacher": a_teacher(), "student": Classifier(), "cache": TeacherCache(tmp_path)}
    with pytest.raises(kind, match=message):
        DistillationModule(**{**given, **arguments})
