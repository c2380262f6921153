"""How a teacher's outputs are kept: in fewer bits, or only the largest of them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt._precision import widened

Parts = Mapping[str, Tensor]


class Encoding(ABC):
    """Turns an output (N, ...) into tensors of N rows, and back."""

    @abstractmethod
    def encode(self, output: Tensor) -> dict[str, Tensor]:
        """Return the parts that are kept.

        Raises:
            ValueError: If they can't say what ``output`` does.
        """

    @abstractmethod
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """Return the output, in float32 or better, from its ``parts`` and the ``shape`` of one sample of it."""

    @abstractmethod
    def gap(self, parts: Parts, live: Tensor) -> Tensor:
        """Return by how much each row of ``live`` is off ``parts``.

        It is relative to the largest number of the row or, where that is small, to that of rows on average.
        """


@dataclass(frozen=True)
class Rounded(Encoding):
    """Every number, in another type.

    Args:
        dtype: What numbers are kept in.
    """

    dtype: torch.dtype

    @override
    def encode(self, output: Tensor) -> dict[str, Tensor]:
        return {"": rounded(output, self.dtype)}

    @override
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        return widened(parts[""])

    @override
    def gap(self, parts: Parts, live: Tensor) -> Tensor:
        return _relative_gap(widened(parts[""]), widened(live))


@dataclass(frozen=True)
class TopK(Encoding):
    r"""The :math:`k` largest logits and their classes; of the others one number, the mean of :math:`e^z`.

    Decoded, each of the others gets the logarithm of that mean. The :math:`k` probabilities at temperature 1 are
    then the teacher's own, and what is left is the same for every other class.

    Args:
        dtype: What numbers are kept in.
        top_k: How many logits are kept, fewer than there are classes.
        dim: Which dimension of the output classes are in.
    """

    dtype: torch.dtype
    top_k: int
    dim: int

    @override
    def encode(self, output: Tensor) -> dict[str, Tensor]:
        classes = output.shape[self.dim]
        if self.top_k >= classes:
            raise ValueError(
                f"`top_k` must be smaller than the number of classes. Found `top_k = {self.top_k}` and {classes} "
                f"classes in dimension {self.dim} of logits of shape {tuple(output.shape)}. Give `top_k=None`, or the "
                "dimension of classes as `class_dim`."
            )
        values, index = output.topk(self.top_k, dim=self.dim)
        rest = self._mean_of_rest(output, index)
        return {
            "values": rounded(values, self.dtype),
            "rest": rounded(rest, self.dtype),
            "index": index.to(torch.int32),
        }

    @override
    def decode(self, parts: Parts, shape: tuple[int, ...]) -> Tensor:
        values, rest = widened(parts["values"]), widened(parts["rest"])
        return rest.expand(len(rest), *shape).scatter(self.dim, parts["index"].long(), values)

    @override
    def gap(self, parts: Parts, live: Tensor) -> Tensor:
        # At the classes that were kept: a tie for the last of them may now go to another.
        live, index = widened(live), parts["index"].long()
        kept = torch.cat([widened(parts["values"]), widened(parts["rest"])], self.dim)
        return _relative_gap(
            kept, torch.cat([live.gather(self.dim, index), self._mean_of_rest(live, index)], self.dim)
        )

    def _mean_of_rest(self, output: Tensor, index: Tensor) -> Tensor:
        others = widened(output).scatter(self.dim, index, -math.inf).logsumexp(self.dim, keepdim=True)
        return others - math.log(output.shape[self.dim] - self.top_k)


def rounded(output: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``output`` in ``dtype``.

    Raises:
        ValueError: If there are numbers that it can't hold.
    """
    small = output.to(dtype)
    if output.isnan().any():
        raise ValueError(
            "A teacher's outputs are kept to be used again, so they must be numbers. Found NaN. Check the teacher and "
            "its inputs."
        )
    if not torch.equal(small.isinf(), output.isinf()):
        raise ValueError(
            f"Outputs must be at most {torch.finfo(dtype).max:.0f} to be kept in {name_of(dtype)}. Found "
            f"{output[~output.isinf()].abs().max():.4g}. Give `dtype='bfloat16'` or `dtype='float32'`."
        )
    return small


def name_of(dtype: torch.dtype) -> str:
    """Return the name of ``dtype`` without its module, as ``float16``."""
    return str(dtype).removeprefix("torch.")


def _relative_gap(kept: Tensor, live: Tensor) -> Tensor:
    kept, live = kept.unsqueeze(-1).flatten(1), live.unsqueeze(-1).flatten(1)
    gap = (kept - live).abs().where(kept != live, 0)  # of equal infinities too
    scale = live.abs().where(live.isfinite(), 0).amax(1)
    # A row of nearly nothing, as of dead features, isn't off by rounding noise that others drown.
    return gap.amax(1) / scale.clamp_min(scale.mean()).clamp_min(torch.finfo(live.dtype).tiny)
