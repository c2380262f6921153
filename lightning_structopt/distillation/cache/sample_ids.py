"""Numbers for the samples of a data set, so that what a teacher said of one is found again in any order."""

import pickle
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from typing_extensions import override

from lightning_structopt._checks import require_callable, require_whole


class Identified(NamedTuple):
    """A sample and its number; a batch of them is a batch as it was and a tensor of numbers.

    Example:
        >>> from torch.utils.data import default_collate
        >>> default_collate([Identified(7, 0.5), Identified(3, 1.5)]).id
        tensor([7, 3])
    """

    id: Any
    """A whole number; of a batch, a tensor (N,) of them."""

    sample: Any
    """What the data set gives."""


class WithIds(Dataset[Identified]):
    """A data set whose samples carry their numbers, as :class:`Identified`.

    A sample's number is its index. Wrap before you take subsets or split, so that numbers don't depend on it. One
    cache goes with one data set: two of them would use the same numbers. With a ``collate_fn`` of your own, give the
    loader ``CollateWithIds(collate_fn)``.

    Args:
        dataset: Any data set with a length and indices.
        seed: Makes random augmentation repeat itself: a sample is drawn with random states that only depend on
            ``seed`` and its number, in every epoch and every worker. At least 0; None leaves randomness alone.

    Raises:
        ValueError: If ``seed`` is negative.
        TypeError: If ``dataset`` has no indices, or has numbers already, or ``seed`` is not a whole number.

    Example:
        >>> WithIds(["a", "b", "c"])[2]
        Identified(id=2, sample='c')
    """

    def __init__(self, dataset: Any, seed: int | None = None) -> None:
        if isinstance(dataset, (IterableDataset, WithIds)) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise TypeError(
                "`WithIds` numbers samples by their index, so it needs a data set with `__getitem__` and `__len__`, "
                f"and without numbers. Found a `{type(dataset).__name__}`. Read streams into a list or files."
            )
        if seed is not None:
            require_whole("seed", seed, 0)
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, index: int) -> Identified:
        number = range(len(self))[int(index)]  # counts negative ones from the end, and ends iteration
        if self.seed is None:
            return Identified(number, self.dataset[number])
        with _own_randomness(self.seed, number):
            return Identified(number, self.dataset[number])

    def __getitems__(self, indices: Sequence[int]) -> list[Identified]:
        """Return several samples, all at once where the data set can do that and no seed is given for each."""
        if self.seed is None and hasattr(self.dataset, "__getitems__"):
            numbers = [range(len(self))[int(index)] for index in indices]
            return [
                Identified(*pair) for pair in zip(numbers, self.dataset.__getitems__(numbers), strict=True)
            ]
        return [self[index] for index in indices]

    def require_repeatable(self, samples: int = 32) -> None:
        """Raise if a sample drawn twice isn't the same, as under random augmentation.

        Args:
            samples: How many are drawn twice; they are spread over the data set.

        Raises:
            ValueError: If one differs from itself.
        """
        with _own_randomness(0, 0):
            for place in range(min(samples, len(self))):
                number = place * len(self) // min(samples, len(self))
                if not _same(self[number].sample, self[number].sample):
                    raise ValueError(
                        "What is kept of a teacher's outputs must be of the same inputs in every epoch. Found that "
                        f"sample {number} differs each time it is drawn, as by random augmentation. {REMEDY}"
                    )


def require_repeatable(loader: Any) -> None:
    """Raise if samples that ``loader`` draws twice aren't the same; of data sets without numbers nothing is known.

    Raises:
        ValueError: If one differs from itself.
    """
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not isinstance(dataset, WithIds):
        dataset = getattr(dataset, "dataset", None)  # of a subset
    if dataset is not None:
        dataset.require_repeatable()


REMEDY = (
    "Give `WithIds(dataset, seed=0)`, so that each sample is always augmented alike, turn augmentation off, or do "
    "without a cache."
)


@dataclass(frozen=True)
class CollateWithIds:
    """Makes batches of numbered samples by way of a ``collate_fn`` that knows nothing of numbers.

    Args:
        collate_fn: Makes a batch of a list of samples.

    Example:
        >>> CollateWithIds("".join)([Identified(4, "a"), Identified(2, "b")])
        Identified(id=tensor([4, 2]), sample='ab')
    """

    collate_fn: Callable[[list[Any]], Any]

    def __post_init__(self) -> None:
        require_callable("collate_fn", self.collate_fn)

    def __call__(self, samples: list[Identified]) -> Identified:
        """Return the batch and its numbers."""
        numbers = torch.tensor([each.id for each in samples])
        return Identified(numbers, self.collate_fn([each.sample for each in samples]))


@contextmanager
def _own_randomness(seed: int, number: int) -> Iterator[None]:
    """Draw from states of Python, numpy and torch that only depend on ``seed`` and ``number``; restore all after."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    mixed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    try:
        random.seed(mixed)
        np.random.seed(mixed)
        torch.default_generator.manual_seed(mixed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (Tensor, np.ndarray)):
        one, other = torch.as_tensor(one), torch.as_tensor(other)
        return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return pickle.dumps(one) == pickle.dumps(other)  # also images, whose classes may not define equality
