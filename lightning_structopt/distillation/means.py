"""Means over an epoch, summed on the device: logging each value of each step would cost more than the losses."""

from collections.abc import Mapping

from torch import Tensor


class Means:
    """Running means of named values, weighted by how many samples each is of.

    Example:
        >>> import torch
        >>> means = Means()
        >>> means.add({"loss": torch.tensor(1.0)}, samples=3)
        >>> means.add({"loss": torch.tensor(5.0)}, samples=1)
        >>> means.take()
        {'loss': tensor(2.)}
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor], samples: int) -> None:
        """Take in the values of a step, each a scalar mean over ``samples``."""
        for name, value in values.items():
            weighted = value.detach() * samples
            before = self._sums.get(name)
            self._sums[name] = weighted if before is None else before + weighted
            self._samples[name] = self._samples.get(name, 0) + samples

    @property
    def samples(self) -> int:
        """How many samples were seen, of the value that was seen most."""
        return max(self._samples.values(), default=0)

    def take(self) -> dict[str, Tensor]:
        """Return the means, and start over."""
        means = {name: total / self._samples[name] for name, total in self._sums.items()}
        self._sums, self._samples = {}, {}
        return means
