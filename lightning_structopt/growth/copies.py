"""How often each channel is there, and the indices that say so for every parameter."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from typing_extensions import override

from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.labels import Labelled
from lightning_structopt.shrinking.literals import Sizes
from lightning_structopt.shrinking.operators import Value
from lightning_structopt.shrinking.tracing import Origin

Copies = dict[str, dict[int, list[int]]]


def multiplicities(size: int, factor: float, generator: torch.Generator) -> Tensor:
    """Return how often each of ``size`` members is there when there are ``factor`` times as many.

    All are there equally often, to one: those that are there once more are drawn.

    Args:
        size: How many members there are.
        factor: At least 1; ``size * factor`` is rounded.
        generator: Draws.

    Returns:
        int64 of shape (size,).

    Example:
        >>> multiplicities(3, 2.0, torch.Generator())
        tensor([2, 2, 2])
        >>> multiplicities(3, 1.7, torch.Generator().manual_seed(0)).sum()
        tensor(5)
    """
    wanted = round(size * factor)
    often = torch.full((size,), wanted // size)
    often[torch.randperm(size, generator=generator)[: wanted % size]] += 1
    return often


def copied_indices(origins: Sequence[Origin], counts: Sequence[tuple[ChannelGroup, Tensor]]) -> Copies:
    """Return for each parameter and buffer that grows the old index of each new one, along each dimension.

    A copy comes right after what it is a copy of, so that whatever cuts, joins or reshapes a tensor finds the parts in
    their order. The features of a head are copied as a whole.

    Args:
        origins: All dimensions of parameters and buffers.
        counts: Groups, with how often each of their members is there.
    """
    often: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
    for group, count in counts:
        for slot, indices in group.slots.items():
            known = often.setdefault(slot, {})
            for member, (own, times) in enumerate(zip(indices.tolist(), count.tolist(), strict=True)):
                known |= {index: (int(group.classes[member]), times) for index in own}
    copies: Copies = {}
    for origin in origins:
        known = often.get((origin.name, origin.dim), {})
        if any(times > 1 for _, times in known.values()):
            copies.setdefault(origin.name, {})[origin.dim] = _in_order(origin.size, known)
    return copies


def _in_order(size: int, often: Mapping[int, tuple[int, int]]) -> list[int]:
    """Repeat the runs of neighbours that belong to one member."""
    result: list[int] = []
    start = 0
    for index in range(1, size + 1):
        if index == size or index not in often or often[index] != often.get(start):
            run = list(range(start, index))
            result += run * (often[start][1] if start in often else 1)
            start = index
    return result


class Multiples(Sizes):
    """How many elements tensors have when channels are there several times.

    Args:
        values: The labels of each node.
        classes: The class of each label.
        often: For each class, how often it is there.
    """

    def __init__(self, values: Mapping[fx.Node, Value], classes: Tensor, often: Tensor) -> None:
        super().__init__(values, often)
        self._classes, self._often = classes, often

    @override
    def along(self, value: Labelled, dim: int) -> Tensor | None:
        result = None
        for layer in value.along(dim):
            own = self._classes[layer.labels]
            if bool((own == own.narrow(dim, 0, 1)).all()):
                continue  # the inside of a member, such as the features of a head
            others = [axis for axis in layer.dims if axis != dim]
            often = self._often[own]
            often = (often.amax(others) if others else often).reshape(-1)
            result = often if result is None else torch.maximum(result, often)
        return None if result is None or bool((result == 1).all()) else result
