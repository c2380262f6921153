"""Which weights go together, and how the sparsity is shared out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_list, require_type, require_whole
from lightning_structopt.pruning.criteria import Scores
from lightning_structopt.pruning.distributions import Distribution, Uniform
from lightning_structopt.pruning.lowest import Count, Masks, drop_lowest
from lightning_structopt.pruning.sharding import WHOLE, Sharding

Scope = Literal["global", "layer"]


class Pattern(ABC):
    """A rule that turns scores into masks of a given sparsity."""

    takes_bias: bool = False
    """Whether the bias of a row goes with it."""

    by_output: bool = False
    """Whether it takes weights with their outputs first: those of transposed convolutions are turned for it."""

    @abstractmethod
    def choose(
        self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float, sharding: Sharding = WHOLE
    ) -> Masks:
        """Choose what to keep.

        What is pruned stays pruned: nothing outside ``keep`` is kept.

        Args:
            scores: Importance of every weight.
            keep: The masks so far, by parameter name; True where a weight is kept.
            sparsity: Fraction of weights to be zero afterwards, in [0, 1).
            sharding: How the weights are spread over ranks; scores and masks are those of this rank's parts.

        Returns:
            The new masks, by parameter name.
        """

    def require(self, sparsity: float, weights: Mapping[str, Tensor]) -> None:  # noqa: B027 (most need nothing)
        """Raise before training if the pattern can't give ``weights`` this final ``sparsity``.

        Raises:
            ValueError: If it can't.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight for itself.

    Args:
        scope: ``"global"`` compares the weights of all layers with each other: exactly
            ``round(sparsity * count)`` of them go, and layers end with different sparsity. ``"layer"`` prunes
            within each layer, each exact to one weight.
        distribution: How ``scope="layer"`` shares the sparsity among layers; by default all have the same.

    Raises:
        TypeError: If ``distribution`` is not a ``Distribution``.
        ValueError: If ``scope`` is something else, or a ``distribution`` other than ``Uniform()`` comes with
            ``scope="global"``, which shares by the scores.
    """

    scope: Scope = "global"
    distribution: Distribution = Uniform()

    def __post_init__(self) -> None:
        require_choice("scope", self.scope, ("global", "layer"))
        require_type("distribution", self.distribution, Distribution)
        if self.scope == "global" and self.distribution != Uniform():
            raise ValueError(
                'A `distribution` shares sparsity among layers and needs `scope="layer"`. Found '
                f"`scope = 'global'` with `distribution = {self.distribution!r}`."
            )

    @override
    def choose(
        self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float, sharding: Sharding = WHOLE
    ) -> Masks:
        if self.scope == "global":
            return drop_lowest(scores, keep, lambda total: round(sparsity * total), sharding)
        shapes = {name: sharding.shapes.get(name, mask.shape) for name, mask in keep.items()}
        shares = self.distribution.share(shapes, sparsity)
        masks: Masks = {}
        for name, mask in keep.items():
            masks |= drop_lowest(scores, {name: mask}, _round_share(shares[name]), sharding)
        return masks

    @override
    def require(self, sparsity: float, weights: Mapping[str, Tensor]) -> None:
        if self.scope == "layer":
            self.distribution.share({name: weight.shape for name, weight in weights.items()}, sparsity)


@dataclass(frozen=True)
class NByM(Pattern):
    """At most ``n`` weights of every ``m`` consecutive inputs are kept, as 2:4 sparse hardware wants it.

    The groups run along the second dimension: the inputs of linear layers and the input channels, at one
    place of the kernel, of convolutions. The ramp turns whole groups, first those that lose least, so that
    sparsity grows up to ``1 - n / m``, which is the only final sparsity there is.

    Mishra et al., "Accelerating Sparse Deep Neural Networks" (2021).

    Args:
        n: Weights that are kept of each group, at least 1.
        m: Size of a group, more than ``n``.

    Raises:
        TypeError: If ``n`` or ``m`` is not a whole number.
        ValueError: If they are out of range.

    Example:
        >>> pattern = NByM(2, 4)
        >>> weights = {"weight": torch.tensor([[4.0, -1.0, 2.0, 3.0]])}
        >>> keep = {"weight": torch.ones(1, 4, dtype=torch.bool)}
        >>> pattern.choose(Scores(weights, power=1), keep, 0.5)["weight"]
        tensor([[ True, False, False,  True]])
    """

    n: int
    m: int
    by_output = True

    def __post_init__(self) -> None:
        require_whole("n", self.n, 1)
        require_whole("m", self.m, self.n + 1)

    @property
    def _final(self) -> float:
        return 1 - self.n / self.m

    @override
    def choose(
        self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float, sharding: Sharding = WHOLE
    ) -> Masks:
        grouped = {name: self._grouped(scores.dense(name)) for name in keep}
        lowest = {name: g.argsort(dim=-1, stable=True)[..., : self.m - self.n] for name, g in grouped.items()}
        loss = {name: g.gather(-1, lowest[name]).sum(-1) for name, g in grouped.items()}
        untouched = {name: self._grouped(mask).all(-1) for name, mask in keep.items()}
        left = drop_lowest(
            Scores(loss), untouched, lambda groups: round(sparsity / self._final * groups), sharding
        )
        return {
            name: keep[name] & self._kept(keep[name], lowest[name], untouched[name] & ~left[name])
            for name in keep
        }

    @override
    def require(self, sparsity: float, weights: Mapping[str, Tensor]) -> None:
        if abs(sparsity - self._final) > 1e-9:
            raise ValueError(
                f"`{self!r}` ends at a sparsity of {self._final}. Found `sparsity = {sparsity}`."
            )
        for name, weight in weights.items():
            if weight.shape[1] % self.m:
                raise ValueError(
                    f"`{self!r}` needs an input size divisible by {self.m}. Found `{name}` of shape "
                    f"{tuple(weight.shape)}. Exclude that parameter or pad the layer."
                )

    def _grouped(self, tensor: Tensor) -> Tensor:
        """Bring groups of ``m`` inputs into a last dimension of their own: (out, kernel, in / m, m)."""
        columns = tensor.reshape(*tensor.shape[:2], -1).movedim(1, -1)
        return columns.reshape(*columns.shape[:-1], -1, self.m)

    def _kept(self, like: Tensor, lowest: Tensor, turned: Tensor) -> Tensor:
        """Return a mask of the shape of ``like`` without the ``lowest`` of those groups that are ``turned``."""
        kept = torch.ones_like(self._grouped(like)).scatter_(-1, lowest, False) | ~turned.unsqueeze(-1)
        return kept.flatten(-2).movedim(-1, 1).reshape(like.shape)


@dataclass(frozen=True)
class Block(Pattern):
    """Blocks of neighbouring weights go together.

    A weight is cut into blocks as a matrix of outputs by inputs, where a convolution's inputs are its input
    channels times the places of its kernel.

    Args:
        shape: Rows and columns of a block, each at least 1; they must divide every pruned weight.
        scope: Whether blocks of all layers are compared (``"global"``) or those of each (``"layer"``).

    Raises:
        TypeError: If ``shape`` is not two whole numbers.
        ValueError: If ``scope`` or ``shape`` is out of range.
    """

    shape: tuple[int, int]
    scope: Scope = "global"
    by_output = True

    def __post_init__(self) -> None:
        require_choice("scope", self.scope, ("global", "layer"))
        require_list("shape", self.shape)
        rows_and_columns = tuple(self.shape)  # a YAML file gives a list
        if len(rows_and_columns) != 2:
            raise ValueError(f"`shape` must be rows and columns. Found `shape = {self.shape!r}`.")
        for size in rows_and_columns:
            require_whole("shape", size, 1)
        object.__setattr__(self, "shape", rows_and_columns)

    @override
    def choose(
        self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float, sharding: Sharding = WHOLE
    ) -> Masks:
        units = Scores({name: self._blocks(scores.dense(name)).sum((1, 3)) for name in keep})
        kept = {name: self._blocks(mask).any(3).any(1) for name, mask in keep.items()}
        chosen = _drop_units(units, kept, sparsity, self.scope, sharding)
        return {name: mask & self._spread(chosen[name]).view(mask.shape) for name, mask in keep.items()}

    @override
    def require(self, sparsity: float, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            matrix = weight.flatten(1).shape
            if matrix[0] % self.shape[0] or matrix[1] % self.shape[1]:
                raise ValueError(
                    f"`{self!r}` must divide every weight. Found `{name}`, a matrix of shape {tuple(matrix)}. "
                    "Exclude that parameter or take another block."
                )

    def _blocks(self, weight: Tensor) -> Tensor:
        rows, columns = self.shape
        matrix = weight.flatten(1)
        return matrix.reshape(len(matrix) // rows, rows, -1, columns)

    def _spread(self, blocks: Tensor) -> Tensor:
        rows, columns = self.shape
        return blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


@dataclass(frozen=True)
class Neurons(Pattern):
    """Whole output rows go, with their bias: neurons of linear layers, filters of convolutions.

    Sparsity counts neurons. Layers of different width compare by a neuron's mean score, and each keeps one.
    Rows are masked, not removed: what follows a dead neuron (a norm's shift, the next layer's columns) is the
    business of :mod:`lightning_structopt.shrinking`. Give ``spare="last"`` where the last layer's rows are
    the outputs of the model.

    Args:
        scope: Whether neurons of all layers are compared (``"global"``) or those of each (``"layer"``).

    Raises:
        ValueError: If ``scope`` is something else.
    """

    scope: Scope = "layer"
    takes_bias = True
    by_output = True

    def __post_init__(self) -> None:
        require_choice("scope", self.scope, ("global", "layer"))

    @override
    def choose(
        self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float, sharding: Sharding = WHOLE
    ) -> Masks:
        units = Scores({
            name: _raise_best(name, scores.dense(name).flatten(1).mean(1), sharding) for name in keep
        })
        kept = {name: mask.flatten(1).any(1) for name, mask in keep.items()}
        chosen = _drop_units(units, kept, sparsity, self.scope, sharding, protected=1)
        return {name: mask & chosen[name].view(-1, *[1] * (mask.ndim - 1)) for name, mask in keep.items()}


def _raise_best(name: str, rows: Tensor, sharding: Sharding) -> Tensor:
    """Rank the best neuron of a layer above those of all layers."""
    best = float(rows.max()) if len(rows) else -math.inf
    if sharding.leads(name, best) and len(rows):
        rows[rows.argmax()] = torch.inf
    return rows


def _drop_units(
    scores: Scores,
    keep: Mapping[str, Tensor],
    sparsity: float,
    scope: Scope,
    sharding: Sharding,
    protected: int = 0,
) -> Masks:
    """Prune groups of weights that have one score each; ``protected`` of every layer's may not go."""
    layers = [dict(keep)] if scope == "global" else [{name: mask} for name, mask in keep.items()]
    masks: Masks = {}
    for layer in layers:
        masks |= drop_lowest(scores, layer, _round_share(sparsity, protected * len(layer)), sharding)
    return masks


def _round_share(share: float, safe: int = 0) -> Count:
    return lambda total: min(round(share * total), total - safe)
