"""Channels, heads and neurons: classes of indices that can only go together, and groups of alike classes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt.shrinking.labels import LabelSpace, Layer
from lightning_structopt.shrinking.operators import parts_of
from lightning_structopt.shrinking.tracing import Origin, Trace

Slot = tuple[str, int]  # the name of a parameter or buffer, and one of its dimensions


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Members to choose from, alike in what they are made of: the channels of a layer, the heads of an attention.

    Args:
        name: The first parameter and dimension that they are indices of.
        slots: For each parameter (or buffer) and dimension, the indices of each member, of shape (members, indices
            per member).
        classes: The class of labels of each member.
        removable: For each member, whether it has no effect as it is.
        normalized: Whether a normalization or a mean reduces over them, so that its result changes without some.
    """

    name: str
    slots: Mapping[Slot, Tensor]
    classes: Tensor
    removable: Tensor
    normalized: bool

    @property
    def size(self) -> int:
        """The number of members."""
        return len(self.classes)

    @override
    def __repr__(self) -> str:
        return f"ChannelGroup({self.name!r}, size={self.size}, slots={len(self.slots)})"


@dataclass(frozen=True, eq=False)
class Groups:
    """What of a module can go.

    Args:
        groups: The groups, those under a normalization too.
        classes: The class of each label.
        kept: Why labels are kept, and which.
    """

    groups: tuple[ChannelGroup, ...]
    classes: Tensor
    kept: tuple[tuple[str, Tensor], ...]


def find_groups(traces: Sequence[Trace], exclude: Sequence[str] = ()) -> Groups:
    """Find the groups of a traced module.

    Args:
        traces: The module's trace; if it runs differently in training, that one too.
        exclude: Globs on names of parameters that keep their shapes.

    Raises:
        ValueError: If a glob matches no parameter.
    """
    trace = traces[0]
    space = trace.space
    unused = torch.zeros(space.size, dtype=torch.bool)
    unused[trace.unused] = True
    for other in traces[1:]:
        unused &= _add(space, trace.origins, other)
    space.fix(unused.nonzero()[:, 0], "no operator that uses it")
    classes = _regular(space, traces[:1])
    excluded = _excluded(trace.origins, exclude)
    if excluded.numel():
        space.fix(excluded, "`exclude`")
        classes = space.classes()
    return Groups(_alike(trace, classes), classes, tuple(space.notes))


def _add(space: LabelSpace, origins: Sequence[Origin], other: Trace) -> Tensor:
    """Take over what another trace says of the same indices, and return which of ours it does not use."""
    theirs = {(origin.name, origin.dim): origin.first for origin in other.origins}
    same = torch.zeros(space.size, dtype=torch.int64)  # of each of our labels, theirs
    ours = torch.zeros(other.space.size, dtype=torch.int64)
    for origin in origins:
        own = torch.arange(origin.first, origin.first + origin.size)
        same[own] = own - origin.first + theirs[origin.name, origin.dim]
        ours[same[own]] = own
    classes = _regular(other.space, [other])
    unused = torch.isin(same, other.unused)
    own = (~unused).nonzero()[1:, 0]
    roots = classes[same[own]]
    space.tie(own, ours[roots])  # with label 0 where that is theirs
    space.mark_normalized(own[torch.isin(roots, other.space.normalized_classes(classes))])
    space.consume(own, ~torch.isin(roots, other.space.alive_classes(classes)))
    space.directions += [ours[labels] for labels in other.space.directions]
    return unused


def _regular(space: LabelSpace, traces: Sequence[Trace]) -> Tensor:
    """Return the classes, once every tensor keeps a grid of its elements.

    Where labels vary along several dimensions and nothing made them whole along all but one of them, the same
    columns go in every row.
    """
    layers = _spread_out(traces)
    while True:
        classes = space.classes()
        # A class is tied once a round: seen from the other side of a transpose, rows are columns.
        touched = torch.zeros(space.size, dtype=torch.bool)
        for layer in layers:
            own = classes[layer.labels]
            varying = [dim for dim in layer.dims if bool((own != own.narrow(dim, 0, 1)).any())]
            if len(varying) > 1 and not bool(touched[own].any()):
                touched[own] = True
                for dim in varying[:-1]:
                    space.tie(layer.labels, layer.labels.narrow(dim, 0, 1))
        if not bool(touched.any()):
            return classes


def _spread_out(traces: Sequence[Trace]) -> list[Layer]:
    """Return the layers of all tensors that vary along more than one dimension."""
    found: dict[int, Layer] = {}
    for trace in traces:
        for value in trace.values.values():
            for part in parts_of(value):
                found |= {id(layer.labels): layer for layer in part.layers if len(layer.dims) > 1}
    return list(found.values())


def _excluded(origins: Sequence[Origin], exclude: Sequence[str]) -> Tensor:
    labels = [torch.empty(0, dtype=torch.int64)]
    for glob in exclude:
        matching = [origin for origin in origins if fnmatchcase(origin.name, glob)]
        if not matching:
            starts = sorted({origin.name.split(".")[0] for origin in origins})
            raise ValueError(
                f"No parameter matches `exclude = {glob!r}`. Parameters start with: {', '.join(map(repr, starts))}."
            )
        labels += [torch.arange(origin.first, origin.first + origin.size) for origin in matching]
    return torch.cat(labels)


def _alike(trace: Trace, classes: Tensor) -> tuple[ChannelGroup, ...]:
    """Sort the classes that can go by what they are made of."""
    kinds = _kinds(trace.origins, classes)
    slots: dict[int, dict[Slot, Tensor]] = defaultdict(dict)
    members: dict[int, Tensor] = {}
    for origin in trace.origins:
        own = _own(origin, classes)
        indices = own.nonzero()[:, 0]
        ordered = indices[own[indices].argsort(stable=True)]
        for kind in dict.fromkeys(kinds[own[indices]].tolist()):
            mine = ordered[kinds[own[ordered]] == kind]
            members.setdefault(kind, own[mine].unique())  # type: ignore[no-untyped-call]
            slots[kind][origin.name, origin.dim] = mine.reshape(len(members[kind]), -1)
    alive, normalized = trace.space.alive_classes(classes), trace.space.normalized_classes(classes)
    return tuple(
        _group(slots[kind], each, ~torch.isin(each, alive), bool(torch.isin(each, normalized).any()))
        for kind, each in members.items()
        if len(each) > 1
    )


def _own(origin: Origin, classes: Tensor) -> Tensor:
    return classes[origin.first : origin.first + origin.size]


def _kinds(origins: Sequence[Origin], classes: Tensor) -> Tensor:
    """Return a number for each class, equal for classes that have as many indices of each parameter and dimension."""
    kinds = torch.zeros(len(classes), dtype=torch.int64)
    last = 0
    for origin in origins:
        own = _own(origin, classes)
        members, counts = own[own != 0].unique(return_counts=True)  # type: ignore[no-untyped-call]
        if len(members):
            # Those that were alike so far, and have as many indices here, remain so.
            together = kinds[members] * (1 + int(counts.max())) + counts
            _, number = together.unique(return_inverse=True)
            kinds[members] = last + 1 + number
            last = int(kinds[members].max())
    return kinds


def _group(
    slots: Mapping[Slot, Tensor], classes: Tensor, removable: Tensor, normalized: bool
) -> ChannelGroup:
    name, dim = next(iter(slots))
    return ChannelGroup(
        name=name if dim == 0 else f"{name}[{dim}]",
        slots=slots,
        classes=classes,
        removable=removable,
        normalized=normalized,
    )
