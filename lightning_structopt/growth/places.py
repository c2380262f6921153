"""Finding the channels that a user names."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

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


def require_copyable(module: nn.Module) -> None:
    """Raise if parts can't be copied, as growth is tried on copies.

    Raises:
        ValueError: If they can't.
    """
    for name, part in module.named_modules():
        if any(isinstance(hook, WeightNorm) for hook in part._forward_pre_hooks.values()):
            raise ValueError(
                "Growth is tried on copies of the module, and torch can't copy what its old `nn.utils.weight_norm` "
                f"makes. Found it on `{name}`. Take `nn.utils.parametrizations.weight_norm`, or remove it by "
                "`nn.utils.remove_weight_norm`."
            )


def is_layer(part: nn.Module) -> bool:
    """Tell whether a module makes channels by a weight of its own."""
    return _weight_of(part) is not None


def _weight_of(part: nn.Module) -> nn.Parameter | None:
    """Return the weight, or what it is made of, that has a layer's outputs as a dimension."""
    weight = getattr(part, "weight", None)
    if isinstance(part, nn.RNNBase):
        weight = part.get_parameter("weight_hh_l0")
    elif is_parametrized(part, "weight"):
        held: Any = part.parametrizations["weight"]  # type: ignore[index]
        # A weight norm holds the length first, and then the direction.
        weight = getattr(held, "original1", None) if hasattr(held, "original1") else held.original
    return weight if isinstance(weight, nn.Parameter) else None


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
    weight = _weight_of(part)
    dim = int(isinstance(part, (*_COLUMNS, nn.RNNBase)))
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
        layers = _layers_that_grow(structure, name)
        remedy = "Name a layer, or a larger block."
        if layers:
            remedy = f"Name a layer, which grows with all that its channels reach: {_listed(layers)}."
        raise ValueError(
            "A block grows in the channels that are within it alone. Found none in "
            f"`{name}`: they reach other parts, the output, or what has a fixed size. {remedy}"
        )
    return found


def _layers_that_grow(structure: Structure, name: str) -> list[str]:
    """Return the layers of a block whose channels are in some group."""
    slots = {slot for group in structure.found.groups for slot in group.slots}
    found = []
    for inner, part in structure.module.get_submodule(name).named_modules(prefix=name):
        if is_layer(part) and _has_rows(part):
            origin = _outputs(structure, part, inner)
            found += [f"`{inner}`"] if (origin.name, origin.dim) in slots else []
    return found


def _has_rows(part: nn.Module) -> bool:
    """Tell whether a layer makes channels; a norm only scales them."""
    weight = _weight_of(part)
    return weight is not None and weight.ndim > 1


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
