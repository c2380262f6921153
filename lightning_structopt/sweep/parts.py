"""Parts of a sweep's training data, so that candidates train on different ones."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt._folds import deal


class DataPart(ABC):
    """A function from a sweep's data to those of one candidate, for ``Candidate(data=...)``.

    The training loader is built again over some of its data set, with its own settings.
    """

    @abstractmethod
    def train(self, samples: int) -> list[int]:
        """Return the indices, of ``samples``, to train on."""

    def validate(self, samples: int) -> list[int] | None:
        """Return those to validate on; None to leave validation as it is."""
        return None

    def __call__(self, data: Any) -> Any:
        """Return this part of ``data``, which stay as they are.

        Args:
            data: A LightningDataModule, a training loader, or a pair of that and validation loaders.

        Raises:
            TypeError: If the training loader, once it is there, is no ``DataLoader`` over a data set with a length.
            ValueError: If it has a sampler of its own.
        """
        if isinstance(data, pl.LightningDataModule):
            part: Any = copy.copy(data)
            kind = type(data)
            # Lightning takes a method that is replaced by a partial function for one of the class.
            part.train_dataloader = partial(_cut_training, kind.train_dataloader, part, self)
            if type(self).validate is not DataPart.validate:
                part.val_dataloader = partial(_cut_validation, kind.train_dataloader, part, self)
            return part
        train, validation = data if isinstance(data, tuple) else (data, None)
        held = _held(self, train)
        return _chosen(self, train), validation if held is None else held


@dataclass(frozen=True)
class Fold(DataPart):
    """Trains on all folds but one, and validates on that one, which is not shuffled.

    Args:
        index: Which fold is held out, in [0, ``folds``).
        folds: How many there are, at least 2.
        seed: Of the order in which samples are dealt to folds.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If one is out of range.

    Example:
        >>> Fold(0, folds=4).train(samples=4), Fold(0, folds=4).validate(samples=4)
        ([1, 3, 2], [0])
    """

    index: int
    folds: int
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("folds", self.folds, 2)
        require_whole("index", self.index, 0)
        require_whole("seed", self.seed, 0)
        if self.index >= self.folds:
            raise ValueError(
                f"`index` must be in [0, folds). Found `index = {self.index}` and `folds = {self.folds}`."
            )

    @override
    def train(self, samples: int) -> list[int]:
        parts = self._parts(samples)
        return [index for fold, part in enumerate(parts) if fold != self.index for index in part]

    @override
    def validate(self, samples: int) -> list[int]:
        return self._parts(samples)[self.index]

    def _parts(self, samples: int) -> list[list[int]]:
        if samples < self.folds:
            raise ValueError(
                f"There must be a sample for each fold. Found {samples} samples for {self.folds} folds. Take fewer "
                "folds."
            )
        return deal(samples, self.folds, self.seed)


@dataclass(frozen=True)
class Bootstrap(DataPart):
    """Trains on as many samples as there are, drawn with replacement: about 63% of them, some several times.

    Breiman, "Bagging Predictors", 1996.

    Args:
        seed: Of the draw.

    Raises:
        TypeError: If ``seed`` is not a whole number.
        ValueError: If it is negative.

    Example:
        >>> len(Bootstrap(seed=1).train(samples=100))
        100
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("seed", self.seed, 0)

    @override
    def train(self, samples: int) -> list[int]:
        drawn = torch.randint(samples, (samples,), generator=torch.Generator().manual_seed(self.seed))
        return [int(index) for index in drawn]


def _cut_training(loader_of: Any, datamodule: Any, part: DataPart) -> DataLoader[Any]:
    return _chosen(part, loader_of(datamodule))


def _cut_validation(loader_of: Any, datamodule: Any, part: DataPart) -> DataLoader[Any] | None:
    return _held(part, loader_of(datamodule))


def _chosen(part: DataPart, loader: Any) -> DataLoader[Any]:
    _require_plain(loader)
    shuffle = isinstance(loader.sampler, RandomSampler)
    return _over(loader, part.train(len(loader.dataset)), shuffle, loader.drop_last)


def _held(part: DataPart, loader: Any) -> DataLoader[Any] | None:
    _require_plain(loader)
    indices = part.validate(len(loader.dataset))
    return None if indices is None else _over(loader, indices, shuffle=False, drop_last=False)


def _over(loader: Any, indices: Sequence[int], shuffle: bool, drop_last: bool) -> DataLoader[Any]:
    """Return a loader as ``loader``, over some of its samples."""
    kind: Any = type(loader)
    found: DataLoader[Any] = kind(
        Subset(loader.dataset, indices),
        batch_size=loader.batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
    return found


def _require_plain(loader: Any) -> None:
    """Raise unless ``loader`` can be built again over some of its samples.

    Raises:
        TypeError: If it is something else than one loader over a data set with a length.
        ValueError: If it has a sampler of its own, which may mean samples that aren't chosen.
    """
    remedy = "Give such a loader, or data for each candidate: `Candidate(make, data=...)`."
    if not isinstance(loader, DataLoader) or not hasattr(loader.dataset, "__len__"):
        what = f"over a `{type(loader.dataset).__name__}`" if isinstance(loader, DataLoader) else ""
        raise TypeError(
            "Parts are taken of one training `DataLoader` over a data set with a length. Found a "
            f"`{type(loader).__name__}` {what}".rstrip()
            + f". {remedy}"
        )
    if type(loader.sampler) not in {RandomSampler, SequentialSampler} or loader.batch_size is None:
        sampler = loader.sampler if loader.batch_size is not None else loader.batch_sampler
        raise ValueError(
            "Parts are taken of a training loader that goes through its data set in order or shuffled. Found a "
            f"`{type(sampler).__name__}`. {remedy}"
        )
