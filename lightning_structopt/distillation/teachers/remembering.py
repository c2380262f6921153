"""A teacher that is asked once for each sample, and answers from a cache after that."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt.distillation.cache.fingerprint import fingerprint
from lightning_structopt.distillation.cache.sample_ids import require_repeatable
from lightning_structopt.distillation.cache.teacher_cache import NOISE_OF_HALF, TeacherCache
from lightning_structopt.distillation.teachers.frozen import FrozenTeacher, Precision


class RememberingTeacher(FrozenTeacher):
    """A frozen teacher with a cache of its outputs.

    The first batch of each epoch is asked live as well, and must be what the cache says.

    Args:
        module: The teacher.
        places: What to return: names of its modules, or "logits".
        read: From a batch to its input.
        cache: Where its outputs are kept.
        precision: What autocast computes in; None for what the trainer's precision says.
    """

    def __init__(
        self,
        module: nn.Module,
        places: Iterable[str],
        read: Callable[[Any], Any],
        cache: TeacherCache,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(module, places, read, precision)
        self.cache = cache
        self._fingerprint = ""

    @override
    def attach(self) -> None:
        super().attach()
        self._fingerprint = fingerprint(self.module)
        self.start_epoch()

    @override
    def start_epoch(self) -> None:
        # Other ranks have written what this one is going to read.
        self.cache.open(self._fingerprint, self.taps.names)

    @override
    def require_data(self, loader: Any) -> None:
        require_repeatable(loader)

    @override
    def __call__(self, batch: Any, batch_idx: int, ids: Tensor | None = None) -> dict[str, Tensor]:
        if ids is None:
            raise ValueError(
                "A cache finds samples by number. Found a batch without. Wrap the training data set in `WithIds`, or "
                "leave `cache` out."
            )
        if not self._fingerprint:
            self.attach()
        known = self.cache.get(ids, self.device)
        if known is not None and batch_idx > 0:
            return {place: known[place] for place in self.taps.names}
        live = super().__call__(batch, batch_idx)
        self.require_numbers()
        if known is None:
            self.cache.put(ids, live)
            # As it will be read, rounded and all: else a training that is killed and goes on learns something else.
            known = self.cache.get(ids, self.device)
            assert known is not None
        else:
            exact = all(output.dtype in {torch.float32, torch.float64} for output in live.values())
            self.cache.check(ids, live, None if exact else NOISE_OF_HALF)
        return {place: known[place] for place in self.taps.names}
