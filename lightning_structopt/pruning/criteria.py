"""How important a weight is: what every criterion is, and those that look at nothing but weights."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_whole
from lightning_structopt.pruning.sharding import WHOLE, Sharding, full, part_of


@dataclass(frozen=True)
class Scores:
    """The importance of every weight, by parameter name.

    Args:
        values: One tensor a parameter, of the parameter's shape.
        power: If given, the score is ``|value| ** power``. Ranking then reads the values as they are, so that
            magnitude pruning builds no copy of the weights.
    """

    values: Mapping[str, Tensor]
    power: int | None = None

    def ranked(self, name: str) -> Tensor:
        """Return a tensor that is ordered as the scores of parameter ``name`` are."""
        return self.values[name] if self.power is None else self.values[name].abs()

    def dense(self, name: str) -> Tensor:
        """Return the scores of parameter ``name`` themselves, in at least float32, ready to be added up."""
        values = widened(self.values[name])
        return values if self.power is None else values.abs() ** self.power


@dataclass(frozen=True)
class Evidence:
    """What is known besides the weights when they are scored.

    Args:
        module: The module that holds the weights.
        totals: What a criterion that learns from training has added up, by parameter name.
        steps: How many optimizer steps or forward passes went into each total.
        sharding: Which parameters this rank holds a part of; their weights and totals are those parts.
        group: Ranks that see data of their own and score together; None if this process decides alone.
    """

    module: nn.Module | None = None
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    sharding: Sharding = WHOLE
    group: dist.ProcessGroup | None = None

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter of that name."""
        return self.root().get_parameter(name)

    def root(self) -> nn.Module:
        """Return the module.

        Raises:
            ValueError: If there is none.
        """
        if self.module is None:
            raise ValueError(
                "This criterion looks at the module. Found none. Give `score` an `Evidence(module=module)`."
            )
        return self.module

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Put the parts of a parameter-shaped tensor together; all ranks call it."""
        return full(part, self.parameter(name)) if name in self.sharding.sharded else part

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of a parameter-shaped tensor, the inverse of :meth:`whole`."""
        return part_of(whole, self.parameter(name)) if name in self.sharding.sharded else whole

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum of ``tensor`` over the ranks of ``group``; itself without one."""
        if self.group is None:
            return tensor
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def count_over_ranks(self, number: int) -> int:
        """Return the sum of ``number`` over the ranks of ``group``."""
        device = next((parameter.device for parameter in self.root().parameters()), torch.device("cpu"))
        return int(self.sum_over_ranks(torch.tensor(number, device=device)))


NOTHING = Evidence()


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in at least float32, in which sums neither overflow nor stall."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Criterion(ABC):
    """A rule that gives every weight a score; the lowest are pruned first."""

    @abstractmethod
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        """Score ``weights``.

        Args:
            weights: The weights by parameter name, of any shape; of a sharded one, this rank's part. Not
                modified.
            evidence: What else is known.

        Returns:
            A score for every weight. It may share memory with ``weights`` and ``evidence``.
        """

    def require(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:  # noqa: B027 (most need nothing)
        """Raise before training if the criterion can't score ``parameters`` of ``module``.

        Raises:
            ValueError: If it can't.
        """


@dataclass(frozen=True)
class Magnitude(Criterion):
    r"""The size of the weight, :math:`|w|^p`.

    Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015).

    Args:
        p: 1 or 2. The same weights go first either way; the two differ where weights are pruned in groups and
            their scores add up.

    Raises:
        ValueError: If ``p`` is neither 1 nor 2.

    Example:
        >>> import torch
        >>> Magnitude().score({"weight": torch.tensor([[-3.0, 1.0]])}).ranked("weight")
        tensor([[3., 1.]])
    """

    p: int = 1

    def __post_init__(self) -> None:
        require_choice("p", self.p, (1, 2))

    @override
    def score(self, weights: Mapping[str, Tensor], evidence: Evidence = NOTHING) -> Scores:
        return Scores(weights, power=self.p)


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
        tensor([[0.6557, 0.6866, 0.7411]])
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
