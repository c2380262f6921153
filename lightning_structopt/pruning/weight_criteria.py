"""Criteria that look at nothing but the weights: LAMP and chance."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt.pruning.criteria import NOTHING, Criterion, Evidence, Scores


@dataclass(frozen=True)
class LAMP(Criterion):
    r"""The magnitude relative to all larger weights of its layer, :math:`w_i^2 / \sum_{j \ge i} w_j^2`.

    Weights are sorted by magnitude, ties by index. Within a layer the same weights go first as by magnitude;
    over all layers (``Unstructured(scope="global")``) it finds a sparsity for each that distorts its output
    little, with no setting.

    Of sharded weights (FSDP2) one layer at a time is put together on every rank.

    Lee et al., "Layer-Adaptive Sparsity for the Magnitude-based Pruning" (2021).

    Example:
        >>> import torch
        >>> LAMP().score({"weight": torch.tensor([[1.0, -2.0, 2.0]])}).values["weight"]
        tensor([[0.1111, 0.5000, 1.0000]])
    """

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        return Scores({
            name: evidence.part(name, _lamp(evidence.whole(name, weight))) for name, weight in weights.items()
        })


def _lamp(weight: Tensor) -> Tensor:
    # Apple's MPS has no float64, in which sums over large layers would be good to the last digit.
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    magnitudes = weight.flatten().abs()
    order = magnitudes.argsort(stable=True)
    squares = magnitudes[order].to(wide).square()
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    ranked = torch.where(squares == 0, squares, squares / not_smaller)  # 0 / 0 in a layer of zeros
    scores = torch.empty_like(magnitudes, dtype=torch.promote_types(weight.dtype, torch.float32))
    scores[order] = ranked.to(scores.dtype)
    return scores.view(weight.shape)


@dataclass(frozen=True)
class Random(Criterion):
    r"""A random number, uniform in [0, 1): what every other criterion should beat.

    A hash of the seed, the parameter's name and the weight's index: the same on every rank and device, with
    any sharding, at every step of a ramp and after a resume, and torch's random state is left alone.

    Args:
        seed: At least 0.

    Raises:
        TypeError: If ``seed`` is not a whole number.
        ValueError: If ``seed`` is negative.

    Example:
        >>> import torch
        >>> Random(seed=1).score({"weight": torch.ones(1, 3)}).values["weight"]
        tensor([[0.7879, 0.4815, 0.2515]])
    """

    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("seed", self.seed, 0)

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        return Scores({name: self._draw(name, weight, evidence) for name, weight in weights.items()})

    def _draw(self, name: str, weight: Tensor, evidence: Evidence) -> Tensor:
        digest = hashlib.blake2b(f"{self.seed}:{name}".encode(), digest_size=8).digest()
        keys = (int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big"))
        whole = evidence.parameter(name) if name in evidence.sharding.sharded else weight
        drawn = [_hash(indices, keys) for indices in _indices(weight, whole)]
        # 24 bits are what a float32 holds exactly.
        return torch.cat([bits.bitwise_right_shift(8).float() * 2**-24 for bits in drawn]).view(weight.shape)


def _hash(numbers: Tensor, keys: tuple[int, int]) -> Tensor:
    """Mix 32-bit ``numbers``, held in int64 so that no product overflows, into others that look random."""
    for key in keys:
        numbers = (numbers ^ key) & 0xFFFFFFFF
        for _ in range(2):
            numbers = ((numbers ^ (numbers >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        numbers = numbers ^ (numbers >> 16)
    return numbers


def _indices(part: Tensor, whole: Tensor, chunk: int = 2**20) -> Iterator[Tensor]:
    """Yield, a chunk at a time, the flat indices in ``whole`` of what this rank holds of it."""
    start, outer_step, inner_step = 0, 0, max(1, part.numel())
    if isinstance(whole, DTensor):
        start, outer_step, inner_step = _place(part, whole)
    for first in range(0, max(1, part.numel()), chunk):
        flat = torch.arange(first, min(first + chunk, part.numel()), device=part.device)
        yield flat + start + flat // inner_step * outer_step


def _place(part: Tensor, whole: DTensor) -> tuple[int, int, int]:
    """Return the flat index of the part's first element, the gaps in it, and how many elements lie between."""
    (placement,) = whole.placements
    assert isinstance(placement, Shard), "what is not sharded has no place"
    dim = placement.dim
    inner = whole.shape[dim + 1 :].numel()
    size = -(
        -whole.shape[dim] // whole.device_mesh.size()
    )  # as torch.chunk cuts, the last ones being smaller
    first = min(whole.device_mesh.get_local_rank() * size, whole.shape[dim])
    return first * inner, (whole.shape[dim] - part.shape[dim]) * inner, max(1, part.shape[dim] * inner)
