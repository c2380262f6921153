"""Numbers of samples: through loaders, workers, subsets and collation, and random augmentation that repeats."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from support import dataset, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, random_split

from lightning_structopt.distillation.cache.sample_ids import CollateWithIds, Identified, WithIds


class Noisy(Dataset):
    """Samples with noise of every kind."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [torch.rand(3), torch.as_tensor(np.random.rand(2)), torch.tensor(random.random())]
        return {"x": torch.cat([part.double().flatten() for part in noise]), "y": index}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(3))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_what_they_were_with_numbers(workers: int) -> None:
    plain = dataset(10)
    loader = DataLoader(WithIds(plain), batch_size=4, shuffle=True, num_workers=workers)
    seen = []
    for batch in loader:
        assert isinstance(batch, Identified)
        inputs, labels = batch.sample
        assert torch.equal(inputs, plain.tensors[0][batch.id])
        assert torch.equal(labels, plain.tensors[1][batch.id])
        seen += batch.id.tolist()
    assert sorted(seen) == list(range(10))


def test_numbers_stay_in_subsets() -> None:
    numbered = WithIds(dataset(10))
    first, second = random_split(numbered, [4, 6])
    assert sorted(sample.id for part in (first, second) for sample in part) == list(range(10))
    assert [sample.id for sample in Subset(numbered, [7, 3])] == [7, 3]
    assert numbered[-1].id == 9
    assert [sample.id for sample in numbered] == list(range(10))
    with pytest.raises(IndexError):
        numbered[10]


def test_several_samples_are_fetched_at_once_where_they_can_be() -> None:
    class Fast(list):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            self.fetched = list(indices)
            return [self[index] for index in indices]

    inner = Fast("abcdef")
    assert WithIds(inner).__getitems__([2, 0]) == [Identified(2, "c"), Identified(0, "a")]
    assert inner.fetched == [2, 0]
    assert WithIds(Subset(inner, [5, 4])).__getitems__([1]) == [Identified(1, "e")]


def test_own_collate_function() -> None:
    def stack(samples: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in samples]) * 2}

    loader = DataLoader(WithIds(dataset(6)), batch_size=3, collate_fn=CollateWithIds(stack))
    batch = next(iter(loader))
    assert torch.equal(batch.id, torch.arange(3))
    assert torch.equal(batch.sample["x"], dataset(6).tensors[0][:3] * 2)


def test_lightning_moves_and_shards_batches(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(pl.LightningModule):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch)
            return batch.id

    trainer(tmp_path).predict(Look(), DataLoader(WithIds(dataset(6)), batch_size=4))
    assert all(isinstance(batch, Identified) for batch in seen)
    assert torch.cat([batch.id for batch in seen]).tolist() == list(range(6))


@pytest.mark.parametrize("workers", [0, 2])
def test_seeded_augmentation_repeats_itself(workers: int) -> None:
    numbered = WithIds(Noisy(), seed=3)
    alone = [numbered[index].sample["x"] for index in range(12)]
    for batch in DataLoader(numbered, batch_size=5, shuffle=True, num_workers=workers):
        assert torch.equal(batch.sample["x"], torch.stack([alone[number] for number in batch.id]))
    assert len({tuple(x.tolist()) for x in alone}) == 12
    assert not torch.equal(WithIds(Noisy(), seed=4)[0].sample["x"], alone[0])


def test_seeded_augmentation_leaves_other_randomness_alone() -> None:
    def seed() -> None:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)

    def draw() -> tuple[Any, ...]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed()
    expected = draw()
    seed()
    WithIds(Noisy(), seed=0)[3]
    with pytest.raises(ValueError, match="sample 0 differs"):
        WithIds(Noisy()).require_repeatable()
    assert draw() == expected


class Pair(NamedTuple):
    x: Tensor
    y: Any


SAME = {
    "tensors": [(torch.ones(2), torch.tensor(1))],
    "nan": [torch.tensor([torch.nan, 1.0])],
    "nested": [{"a": [np.ones(3), "text"], "b": Pair(torch.zeros(1), None)}],
    "own class": [slice(1, 2), 3.5, b"bytes"],
}


@pytest.mark.parametrize("samples", SAME.values(), ids=SAME)
def test_what_repeats_itself_is_taken(samples: list[Any]) -> None:
    WithIds(samples).require_repeatable()


@pytest.mark.parametrize("kind", ["tensor", "array", "dict", "list", "object"])
def test_what_does_not_is_refused(kind: str) -> None:
    class Random(Dataset):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> Any:
            value = torch.rand(2) if index == 77 else torch.zeros(2)
            makers = {
                "tensor": lambda: value,
                "array": value.numpy,
                "dict": lambda: {"x": 1, "z": value},
                "list": lambda: [1, (value, 2)],
                "object": lambda: slice(value.tolist()),
            }
            return makers[kind]()

    message = r"Found that sample 77 differs each time.*Give `WithIds\(dataset, seed=0\)`"
    with pytest.raises(ValueError, match=message):
        WithIds(Random()).require_repeatable(samples=100)
    WithIds(Random(), seed=0).require_repeatable(samples=100)


@pytest.mark.parametrize("given", [Stream(), 3, WithIds([1])], ids=["stream", "number", "numbered"])
def test_data_sets_must_have_indices(given: Any) -> None:
    with pytest.raises(
        TypeError, match=f"needs a data set with `__getitem__`.*Found a `{type(given).__name__}`"
    ):
        WithIds(given)


def test_seed_is_checked() -> None:
    with pytest.raises(ValueError, match="`seed` must be at least 0"):
        WithIds([1], seed=-1)
    with pytest.raises(TypeError, match="`seed` must be a whole number"):
        WithIds([1], seed=0.5)
