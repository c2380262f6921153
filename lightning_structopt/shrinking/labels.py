"""What a tensor's dimensions stand for: labels that travel through the graph instead of numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_structopt.shrinking.components import connected_components
from lightning_structopt.shrinking.zeros import ZeroRule, either_zero

FIXED = 0  # the label of what can't be removed


@dataclass(frozen=True)
class Layer:
    """Labels of the elements of a tensor along one of its origins' dimensions.

    Args:
        labels: int64, of the tensor's rank, of size 1 along every dimension it is constant along.
        zero: bool, of the same shape: all elements of the tensor at that place are known to be zero.
    """

    labels: Tensor
    zero: Tensor

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions along which labels differ."""
        return tuple(dim for dim, size in enumerate(self.labels.shape) if size > 1)

    def reshaped(self, *shape: int) -> "Layer":
        """Return the same labels in another shape of as many elements."""
        return Layer(self.labels.reshape(shape), self.zero.reshape(shape))

    def moved(self, axes: Sequence[int | None]) -> "Layer":
        """Return the layer of a tensor whose dimension ``i`` is dimension ``axes[i]`` of this one, None for new."""
        order = [axis for axis in axes if axis is not None]
        left = [axis for axis in range(self.labels.ndim) if axis not in order]
        shape = [1 if axis is None else self.labels.shape[axis] for axis in axes]
        return Layer(
            self.labels.permute(*order, *left).reshape(shape), self.zero.permute(*order, *left).reshape(shape)
        )


@dataclass(frozen=True)
class Labelled:
    """A tensor of the graph as its shape and its layers; without layers it is data, of which nothing goes."""

    shape: tuple[int, ...]
    layers: tuple[Layer, ...] = ()

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def along(self, dim: int) -> tuple[Layer, ...]:
        """Return the layers whose labels differ along ``dim``."""
        return tuple(layer for layer in self.layers if layer.labels.shape[dim] > 1)


def compact(labels: Tensor, zero: Tensor) -> Layer | None:
    """Make a layer of full-size tensors; None if it says nothing or nothing can go."""
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and labels.stride(dim) == zero.stride(dim) == 0:
            labels, zero = labels.narrow(dim, 0, 1), zero.narrow(dim, 0, 1)
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
            labels, zero = labels.narrow(dim, 0, 1), zero.all(dim, keepdim=True)
    return Layer(labels, zero) if bool(labels.any()) else None


class LabelSpace:
    """All labels of a trace, and what became known of them.

    Labels that must go together are *tied*; those tied to label 0 can't go.
    """

    def __init__(self) -> None:
        self.size = 1
        self.notes: list[tuple[str, Tensor]] = []  # why, and which labels can't go
        # Labels of what is divided by its own length, so that zeros are no use.
        self.directions: list[Tensor] = []
        self._edges: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._normalized: list[Tensor] = []
        self._alive: list[Tensor] = []

    def fresh(self, count: int) -> Tensor:
        """Return ``count`` new labels."""
        self.size += count
        return torch.arange(self.size - count, self.size)

    def fresh_of_buffer(self, count: int) -> Tensor:
        """Return ``count`` new labels of a buffer: a table that need not get smaller."""
        self._buffers.append(self.fresh(count))
        return self._buffers[-1]

    def of_buffers(self, labels: Tensor) -> bool:
        """Tell whether labels are those of buffers alone."""
        given = labels[labels != FIXED]
        return bool(torch.isin(given, torch.cat([*self._buffers, given[:0]])).all())

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Let labels go together, element by element with broadcasting."""
        if one.numel() and other.numel():
            pair = torch.stack([each.reshape(-1) for each in torch.broadcast_tensors(one, other)])  # type: ignore[no-untyped-call]
            self._edges.append(pair if pair.shape[1] < 4096 else torch.unique(pair, dim=1))

    def fix(self, labels: Tensor, why: str) -> None:
        """Keep labels for good."""
        if bool(labels.any()):
            self.notes.append((why, labels.reshape(-1)))
            self.tie(labels, torch.zeros(1, dtype=torch.int64))

    def mark_normalized(self, labels: Tensor) -> None:
        """Remember that an operator reduces over these labels, so that without them its result differs."""
        self._normalized.append(labels.reshape(-1))

    def consume(self, labels: Tensor, dead: Tensor) -> None:
        """Remember where channels end: without effect where ``dead``."""
        labels, dead = torch.broadcast_tensors(labels, dead)  # type: ignore[no-untyped-call]
        self._alive.append(labels[~dead])

    def collapse(self, layer: Layer, dims: Iterable[int], why: str, normalized: bool = False) -> Layer | None:
        """Make ``layer`` constant along ``dims``, by tying; None if it varies along no others.

        Args:
            layer: What to change.
            dims: The dimensions that an operator needs whole.
            why: What the user is told where labels are kept for that.
            normalized: Mark labels instead of keeping them.
        """
        over = [dim for dim in layer.dims if dim in set(dims)]
        if not over:
            return layer
        if len(over) == len(layer.dims):
            if normalized:
                self.mark_normalized(layer.labels)
            else:
                self.fix(layer.labels, why)
            return None
        labels, zero = layer.labels, layer.zero
        for dim in over:
            first = labels.narrow(dim, 0, 1)
            self.tie(labels, first)
            labels, zero = first, zero.all(dim, keepdim=True)
        return Layer(labels, zero)

    def linked(self) -> Tensor:
        """Return which labels are tied to each other otherwise than by what keeps them, as :meth:`classes` does."""
        return connected_components(self.size, [pairs[:, (pairs != FIXED).all(0)] for pairs in self._edges])

    def reasons(self, labels: Tensor) -> list[str]:
        """Return why labels are kept, in the words of what keeps them or something that they are tied to."""
        linked = self.linked()
        own = linked[labels]
        found = (
            why for why, noted in self.notes if bool(torch.isin(linked[noted[noted != FIXED]], own).any())
        )
        return list(dict.fromkeys(found))

    def classes(self) -> Tensor:
        """Return the class of every label: the smallest label it is tied to."""
        return connected_components(self.size, self._edges)

    def normalized_classes(self, classes: Tensor) -> Tensor:
        """Return the classes over which some operator reduces."""
        return _distinct(classes, self._normalized)

    def alive_classes(self, classes: Tensor) -> Tensor:
        """Return the classes of which something has an effect."""
        return _distinct(classes, self._alive)


def _distinct(classes: Tensor, labels: Sequence[Tensor]) -> Tensor:
    found = classes[torch.cat([*labels, torch.empty(0, dtype=torch.int64)])]
    return torch.unique(found)  # type: ignore[no-any-return]


def merge(
    space: LabelSpace,
    values: Sequence[Labelled],
    shape: tuple[int, ...],
    zero_of: ZeroRule,
    why: str,
) -> Labelled:
    """Put the layers of tensors together that are combined element by element.

    Layers that vary along a common dimension are tied. Where another tensor has elements of its own along that
    dimension but no labels, it is data, and that dimension stays whole.

    Args:
        space: All labels.
        values: The tensors.
        shape: The shape they are broadcast to.
        zero_of: Says where the result is zero, given for each tensor where it is zero (None: nowhere).
        why: What the user is told of labels that are kept.
    """
    aligned = [
        [layer.reshaped(*[1] * (len(shape) - value.ndim), *layer.labels.shape) for layer in value.layers]
        for value in values
    ]
    sizes = [(1,) * (len(shape) - value.ndim) + value.shape for value in values]
    aligned = _without_tables(space, aligned, why)
    layers = []
    for dims in _overlapping([layer.dims for each in aligned for layer in each]):
        chosen = [[layer for layer in each if set(layer.dims) & dims] for each in aligned]
        together = [layer for each in chosen for layer in each]
        finest = max(together, key=lambda layer: len(layer.dims))
        for layer in together:
            if layer is not finest:
                space.tie(finest.labels, layer.labels)
        data = {
            dim
            for mine, size in zip(chosen, sizes, strict=True)
            for dim in (() if mine else dims)
            if size[dim] > 1
        }
        whole = space.collapse(finest, data, why)
        if whole is None:
            continue
        zero = zero_of([either_zero([layer.zero for layer in mine]) for mine in chosen])
        layers.append(_with_zero(whole.labels, zero))
    return Labelled(shape, tuple(layers))


def _without_tables(space: LabelSpace, aligned: list[list[Layer]], why: str) -> list[list[Layer]]:
    """Take buffers that have some of the dimensions of other labels for data.

    A table of angles has the features of a head: were it to get smaller, all heads would lose the same features.
    """
    everything = [layer for each in aligned for layer in each]

    def is_table(layer: Layer) -> bool:
        finer = any(set(layer.dims) < set(other.dims) for other in everything)
        return finer and space.of_buffers(layer.labels)

    for layer in filter(is_table, everything):
        space.fix(layer.labels, why)
    return [[layer for layer in each if not is_table(layer)] for each in aligned]


def _overlapping(sets: Iterable[Sequence[int]]) -> list[set[int]]:
    """Return the unions of those sets of dimensions that are linked by common ones."""
    unions: list[set[int]] = []
    for dims in map(set, sets):
        linked = [each for each in unions if each & dims]
        unions = [each for each in unions if not each & dims] + [dims.union(*linked)]
    return [each for each in unions if each]


def _with_zero(labels: Tensor, zero: Tensor | None) -> Layer:
    if zero is None:
        return Layer(labels, torch.zeros_like(labels, dtype=torch.bool))
    for dim in range(zero.ndim):
        if zero.shape[dim] > 1 and labels.shape[dim] == 1:
            zero = zero.all(dim, keepdim=True)
    return Layer(labels, zero.expand(labels.shape))
