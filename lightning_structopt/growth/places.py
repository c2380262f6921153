"""Finding the channels that a user names."""

from collections.abc import Iterable
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from lightning_structopt.pruning.outputs import TRANSPOSED
from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.tracing import Origin, tensors_of

_COLUMNS = (
    *TRANSPOSED,
    nn.Embedding,
    nn.EmbeddingBag,
)  # whose outputs are the second dimension of the weight


def require_submodule(module: nn.Module, name: str, argument: str) -> nn.Module:
    """Return the submodule of that name.

    Raises:
        ValueError: If there is none.
    """
    names: dict[str, nn.Module] = dict(module.named_modules())
    if name not in names:
        near = (
            get_close_matches(name, names, n=3, cutoff=0.4)
            or [each for each, _ in module.named_children()][:5]
        )
        raise ValueError(
            f"`{argument}` must be the name of a submodule. Found `{argument} = {name!r}`. "
            f"Near it: {', '.join(map(repr, near))}."
        )
    return names[name]


def is_layer(part: nn.Module) -> bool:
    """Tell whether a module makes channels by a weight of its own."""
    return isinstance(getattr(part, "weight", None), nn.Parameter) or isinstance(part, nn.RNNBase)


def groups_of(structure: Structure, name: str) -> list[ChannelGroup]:
    """Return the groups of channels that a layer makes; for a block, those that are within it alone.

    Args:
        structure: The module.
        name: Of a submodule; the empty name is the module itself.

    Raises:
        ValueError: If there is no such submodule, or nothing of it can grow.
    """
    part = require_submodule(structure.module, name, "name")
    if not is_layer(part):
        return _within(structure, name)
    origin = _outputs(structure, part, name)
    found = [group for group in structure.found.groups if (origin.name, origin.dim) in group.slots]
    if not found:
        raise ValueError(
            f"A layer grows if its channels reach nothing of a fixed size. Found that {_held(structure, origin)}. Name "
            "a layer further inside, or a block: then what is within it grows."
        )
    return found


def _outputs(structure: Structure, part: nn.Module, name: str) -> Origin:
    """Return the dimension of a layer's weight that makes its outputs."""
    if isinstance(part, nn.RNNBase):
        weight, dim = part.get_parameter("weight_hh_l0"), 1
    else:
        weight, dim = part.get_parameter("weight"), int(isinstance(part, _COLUMNS))
    names = {id(tensor): known for known, tensor in tensors_of(structure.module).items()}
    wanted = (names[id(weight)], dim)
    return next(each for each in structure.traced.origins if (each.name, each.dim) == wanted)


def _within(structure: Structure, name: str) -> list[ChannelGroup]:
    inside = f"{name}." if name else ""
    found = [
        group
        for group in structure.found.groups
        if all(tensor.startswith(inside) for tensor, _ in group.slots)
    ]
    if not found:
        raise ValueError(
            "A block grows in the channels that are within it alone. Found none in "
            f"`{name}`: they reach other parts, the output, or what has a fixed size. Name a layer, or a larger block."
        )
    return found


def _held(structure: Structure, origin: Origin) -> str:
    """Say what keeps the channels of a layer from growing."""
    own = torch.arange(origin.first, origin.first + origin.size)
    reasons = structure.traced.space.reasons(own)
    if not reasons:
        return f"`{origin.name}` has a single channel, or all of them belong to one member"
    group = _listed(_tied(structure, own))
    return f"the group of {group} is held by {', '.join(reasons[:3])}"


def _tied(structure: Structure, labels: Tensor) -> list[str]:
    linked = structure.traced.space.linked()
    own = linked[labels]
    return [
        f"`{each.name}[{each.dim}]`"
        for each in structure.traced.origins
        if bool(torch.isin(linked[each.first : each.first + each.size], own).any())
    ]


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    return ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
