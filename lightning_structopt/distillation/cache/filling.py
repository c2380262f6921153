"""Going through a loader with a teacher, ahead of training."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_structopt.distillation.batches import call_with, default_input
from lightning_structopt.distillation.cache.sample_ids import Identified, WithIds


def outputs_of(teacher: nn.Module, batch: Any) -> Any:
    """Return what ``teacher`` says of ``batch``: of a tensor, of the first part of a sequence, or of a mapping."""
    return call_with(teacher, default_input(batch))


def each_batch(teacher: nn.Module, loader: Iterable[Any], progress: bool) -> Iterator[tuple[Tensor, Any]]:
    """Yield the numbers of samples and the batch, where ``teacher`` is, while it doesn't train.

    Args:
        teacher: In evaluation mode, and without gradients, for as long as this goes on.
        loader: Gives batches of numbered samples.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If samples are not the same each time.
        TypeError: If they carry no numbers.
    """
    _require_repeatable(loader)
    device = next((parameter.device for parameter in teacher.parameters()), torch.device("cpu"))
    modes = [(part, part.training) for part in teacher.modules()]
    try:
        teacher.eval()
        for batch in track(loader, "Filling the teacher cache", disable=not progress):
            if not isinstance(batch, Identified):
                raise TypeError(
                    "A cache knows samples by number. Found batches without, of type "
                    f"`{type(batch).__name__}`. Let the loader's data set be `WithIds(dataset)`, and its `collate_fn`, "
                    "if there is one, `CollateWithIds(collate_fn)`."
                )
            with torch.no_grad():
                yield batch.id, _moved(batch.sample, device)
    finally:
        for part, mode in modes:
            part.training = mode


def _require_repeatable(loader: Any) -> None:
    dataset = getattr(loader, "dataset", None)
    while dataset is not None and not isinstance(dataset, WithIds):
        dataset = getattr(dataset, "dataset", None)  # of a subset
    if dataset is not None:
        dataset.require_repeatable()


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(_moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
