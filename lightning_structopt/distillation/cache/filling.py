"""Going through a loader with a teacher, ahead of training."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_structopt._devices import device_of, moved
from lightning_structopt._undisturbed import evaluating
from lightning_structopt.distillation.batches import call_with, default_input
from lightning_structopt.distillation.cache.sample_ids import Identified, require_repeatable


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
    require_repeatable(loader)
    device = device_of(teacher)
    with evaluating(teacher):
        for batch in track(loader, "Filling the teacher cache", disable=not progress):
            if not isinstance(batch, Identified):
                raise TypeError(
                    "A cache knows samples by number. Found batches without, of type "
                    f"`{type(batch).__name__}`. Let the loader's data set be `WithIds(dataset)`, and its `collate_fn`, "
                    "if there is one, `CollateWithIds(collate_fn)`."
                )
            with torch.no_grad():
                yield batch.id, moved(batch.sample, device)
