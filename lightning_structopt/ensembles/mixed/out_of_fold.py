"""Predictions for data that the predicting model has not seen, for all of the training data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt._folds import deal
from lightning_structopt.ensembles.members import Member, settle
from lightning_structopt.ensembles.predictions import predictions

MakeLoader: TypeAlias = Callable[[Dataset[Any], bool], Iterable[Any]]


class Held(NamedTuple):
    """A sample, or a batch, with what members that were not trained on it say.

    Args:
        inputs: As in the data set.
        outputs: (M, ...), of a batch (N, M, ...).
        target: As in the data set.
    """

    inputs: Any
    outputs: Tensor
    target: Any


class OutOfFold(Dataset[Held]):
    """The predictions of :func:`out_of_fold`: a data set to train a combiner on.

    Args:
        outputs: (M, N, ...), for each factory and sample that of the member which wasn't trained on the sample.
        target: (N, ...).
        dataset: What it was made from.
        members: For each factory the members of all folds.
    """

    def __init__(
        self,
        outputs: Tensor,
        target: Tensor,
        dataset: Dataset[Any],
        members: Sequence[Sequence[nn.Module]],
    ) -> None:
        self.outputs = outputs
        self.target = target
        self.dataset = dataset
        self.members = [list(folds) for folds in members]

    def __len__(self) -> int:
        return len(self.target)

    @override
    def __getitem__(self, index: int) -> Held:
        inputs, target = self.dataset[index]
        return Held(inputs, self.outputs[:, index], target)


def out_of_fold(
    factories: Sequence[Callable[[], nn.Module]],
    dataset: Dataset[Any],
    trainer: Callable[[], Any],
    *,
    folds: int = 5,
    seed: int = 0,
    loader: MakeLoader | None = None,
) -> OutOfFold:
    """Train one model of each factory for each fold, on the others, and gather what they say of the fold.

    So every sample has predictions by models that never saw it, from which a combiner learns how far each kind is to be
    trusted: on their own training data all look better than they are. Wolpert, "Stacked Generalization", 1992.

    Args:
        factories: Each makes a fresh LightningModule.
        dataset: Pairs of inputs and target, with a length.
        trainer: Makes a fresh ``Trainer`` for each model.
        folds: How many, at least 2.
        seed: Of the order in which samples are dealt to folds.
        loader: From a data set, and whether it is for training, to batches; by default of 32, shuffled for training.

    Returns:
        Predictions by sample, and the trained members by factory and fold, to be made one by
        ``[ParallelEnsemble(folds) for folds in found.members]``.

    Raises:
        TypeError: If ``folds`` is not a whole number.
        ValueError: If there are no factories, or fewer samples than folds.

    Example:
        >>> found = out_of_fold([Small, Large], dataset, lambda: pl.Trainer(max_epochs=5))  # doctest: +SKIP
        >>> members = [ParallelEnsemble(folds) for folds in found.members]  # doctest: +SKIP
        >>> stacking = MixedEnsemble(members, nn.Linear(20, 10), trained_on=found.dataset)  # doctest: +SKIP
        >>> pl.Trainer(max_epochs=20).fit(stacking, DataLoader(found, 64, shuffle=True))  # doctest: +SKIP
    """
    require_whole("folds", folds, 2)
    samples = len(dataset)  # type: ignore[arg-type]
    if not factories or samples < folds:
        raise ValueError(
            f"`out_of_fold` needs a factory at least, and a sample for each fold. Found {len(factories)} factories and "
            f"{samples} samples for {folds} folds."
        )
    batches = _batches if loader is None else loader
    parts = deal(samples, folds, seed)
    members: list[list[nn.Module]] = [[] for _ in factories]
    for part in parts:
        rest = [index for other in parts if other is not part for index in other]
        for factory, trained in zip(factories, members, strict=True):
            module = factory()
            trainer().fit(module, batches(Subset(dataset, rest), True))
            trained.append(module.eval())
    return _gathered(members, dataset, parts, batches)


def gather_out_of_fold(
    members: Sequence[Sequence[Member]],
    dataset: Dataset[Any],
    *,
    seed: int = 0,
    loader: MakeLoader | None = None,
) -> OutOfFold:
    """Gather what members that are trained by folds already say of the folds that they haven't seen.

    Args:
        members: By kind, and then by fold, as ``train_members(..., vary="fold")`` returns them for one kind.
        dataset: The very one that the training loader had, in the same order.
        seed: The one by which samples were dealt to folds: that of ``train_members``.
        loader: From a data set, and whether it is for training, to batches; by default of 32.

    Returns:
        Predictions by sample, as of :func:`out_of_fold`.

    Raises:
        ValueError: If there are no members, kinds have different numbers of folds, or there are fewer than two.

    Example:
        >>> small = so.train_members(Small, datamodule, 5, vary="fold", ...)  # doctest: +SKIP
        >>> large = so.train_members(Large, datamodule, 5, vary="fold", ...)  # doctest: +SKIP
        >>> found = gather_out_of_fold([small, large], dataset)  # doctest: +SKIP
    """
    modules = [settle(kind, trained=True) for kind in members]
    folds = {len(kind) for kind in modules}
    samples = len(dataset)  # type: ignore[arg-type]
    if len(folds) != 1 or min(folds) < 2 or samples < min(folds):
        raise ValueError(
            "Each kind needs one member for each of two folds or more, and each fold a sample. Found "
            f"{[len(kind) for kind in modules]} members and {samples} samples. Give what "
            '`train_members(..., vary="fold")` returns, once for each kind.'
        )
    parts = deal(samples, folds.pop(), seed)
    return _gathered(modules, dataset, parts, _batches if loader is None else loader)


def _gathered(
    members: Sequence[Sequence[nn.Module]],
    dataset: Dataset[Any],
    parts: Sequence[Sequence[int]],
    batches: MakeLoader,
) -> OutOfFold:
    """Ask each member about its fold."""
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    for part, asked in zip(parts, zip(*members, strict=True), strict=True):
        found = predictions(asked, batches(Subset(dataset, part), False))
        outputs.append(found.outputs)
        targets.append(found.target)
    order = torch.tensor([index for part in parts for index in part]).argsort()
    return OutOfFold(torch.cat(outputs, 1)[:, order], torch.cat(targets)[order], dataset, members)


def _batches(dataset: Dataset[Any], training: bool) -> DataLoader[Any]:
    return DataLoader(dataset, 32, shuffle=training)


def overlaps(one: Any, other: Any) -> bool:
    """Tell whether two data sets have samples in common, as far as their types show.

    Example:
        >>> data = TensorDataset(torch.arange(9))
        >>> overlaps(Subset(data, range(5)), data), overlaps(Subset(data, [0, 1]), Subset(data, [2]))
        (True, False)
    """
    (root, chosen), (other_root, others) = _root(one), _root(other)
    if root is not other_root and not _same_tensors(root, other_root):
        return False
    return chosen is None or others is None or not chosen.isdisjoint(others)


def _root(dataset: Any) -> tuple[Any, set[int] | None]:
    """Return the data set that ``dataset`` is a part of, and which indices; None for all."""
    indices: list[int] | None = None
    while isinstance(dataset, Subset):
        here = list(dataset.indices)
        indices = here if indices is None else [here[index] for index in indices]
        dataset = dataset.dataset
    return dataset, None if indices is None else set(indices)


def _same_tensors(one: Any, other: Any) -> bool:
    if not isinstance(one, TensorDataset) or not isinstance(other, TensorDataset):
        return False
    first, second = one.tensors[0], other.tensors[0]
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape
