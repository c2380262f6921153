"""Whether two modules compute the same."""

import traceback
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import override

from lightning_structopt._undisturbed import in_mode, without_autocast, without_fast_path
from lightning_structopt.shrinking.copies import copied

TOLERANCE = 1e-5


class _NoChance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dropout keeps everything: a smaller module draws fewer numbers, so that they could not be compared."""

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "aten::bernoulli_":
            return args[0].fill_(1)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def outputs_of(module: nn.Module, inputs: tuple[Any, ...], training: bool = False) -> list[Tensor]:
    """Run a module, whose running statistics that may change, and return all tensors of its output.

    Raises:
        TypeError: If there are none.
    """
    with in_mode(module, training), without_fast_path(), torch.random.fork_rng([]), _NoChance():  # type: ignore[no-untyped-call]
        torch.default_generator.manual_seed(0)
        result = module(*tree_map(_copied, inputs))
    outputs = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    if not outputs:
        raise TypeError(
            f"Shrinking compares outputs, which must be tensors, or lists, tuples and dictionaries of them. Found "
            f"`{type(result).__name__}` of `{type(module).__name__}`. Return one of those, or register the class by "
            "`torch.utils._pytree.register_dataclass`."
        )
    return outputs


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Return the largest difference between two outputs, relative to the largest number in each."""
    if [each.shape for each in one] != [each.shape for each in other]:
        return float("inf")
    worst = 0.0
    for left, right in zip(one, other, strict=True):
        if left.numel() == 0:
            continue
        # Where the masked module has no number, the smaller one need not have one either.
        gap = (left.double() - right.double()).abs().nan_to_num(0.0, posinf=0.0)
        if not torch.equal(left.isfinite(), right.isfinite()):
            return float("inf")
        scale = float(left.double().abs().nan_to_num(0.0, posinf=0.0).max())
        worst = max(worst, float(gap.max()) / max(scale, 1e-12))
    return worst


def difference(
    one: nn.Module, expected: list[Tensor], other: nn.Module, inputs: tuple[Any, ...], training: bool
) -> float:
    """Return how much the outputs of two modules differ, in double precision where rounding leaves doubt.

    Args:
        one: A module.
        expected: Its outputs.
        other: Another module; left as it is.
        inputs: What both are given.
        training: Run as in training.
    """
    unchanged = copied(other) if training else other  # of running statistics
    gap = largest_difference(expected, outputs_of(unchanged, inputs, training))
    if not TOLERANCE < gap < 1:
        return gap
    wide = tree_map(lambda each: each.double() if _is_float(each) else each, inputs)
    with without_autocast():
        try:
            return _difference(copied(one).double(), copied(other).double(), wide, training)
        except RuntimeError:  # code that casts to a type of its own
            return _difference(copied(one), copied(other), inputs, training)


def _difference(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...], training: bool) -> float:
    return largest_difference(outputs_of(one, inputs, training), outputs_of(other, inputs, training))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def failing_parts(module: nn.Module, error: Exception) -> list[str]:
    """Return the names of the submodules that were running when ``error`` was raised, the innermost first."""
    names = {id(part): name for name, part in module.named_modules()}
    places: list[str] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            places.insert(0, names[id(owner)])
    return list(dict.fromkeys(places))


@torch.no_grad()
def zero_out(module: nn.Module, dropped: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Zero indices of parameters, in place.

    Args:
        module: The module.
        dropped: For each parameter, the indices along each dimension.
    """
    for name, dims in dropped.items():
        parameter = module.get_parameter(name)
        for dim, indices in dims.items():
            parameter.index_fill_(dim, indices.to(parameter.device), 0)
