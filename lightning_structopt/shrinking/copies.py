"""Copies of modules, also of those that keep a tensor which they computed."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

_Module = TypeVar("_Module", bound=nn.Module)


def copied(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """Return a deep copy.

    The old ``torch.nn.utils.weight_norm`` leaves the weight that it computed last in the layer, and Python's own copy
    refuses such tensors.

    Args:
        module: The module; left as it is.
        memo: What is copied already, by the ``id`` of what it is a copy of.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def compute_weights(module: nn.Module) -> None:
    """Give layers under the old ``weight_norm`` the weight that they will compute, for its shape."""
    for part in module.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                setattr(part, hook.name, hook.compute_weight(part).detach())
