"""Floating-point operations by layer: as if all weights counted, and of those alone that aren't zero."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lightning_structopt._dtensors import local
from lightning_structopt._undisturbed import plain_attention, undisturbed
from lightning_structopt.profiling.following import following
from lightning_structopt.profiling.inputs import Call

Flops = dict[str, tuple[float, float]]


def count_flops(module: nn.Module, call: Call, nonzero: Mapping[nn.Parameter, int]) -> Flops:
    """Count the floating-point operations of one forward pass in evaluation mode.

    Counted by :mod:`torch.utils.flop_counter`: matrix products, convolutions and attention, at two operations for
    a multiplication with its addition. Elementwise operators, norms and activations count nothing.

    An operator that reads a parameter would be left, by a kernel that skips zeros, with as large a share of its
    operations as the parameter has nonzero entries. No kernel that PyTorch uses by default does skip them.

    Args:
        module: Left as it was, running statistics and random state included.
        call: What it is called with.
        nonzero: How many entries of each parameter are not zero.

    Returns:
        By the name of the submodule whose own operators they are: operations, and the effective ones among them.
    """
    found: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    where: list[str] = [""]
    density = _densities(nonzero)

    def counted(formula: Callable[..., int]) -> Callable[..., int]:
        def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            flops = formula(*args, out_val=out_val, **kwargs)
            share = 1.0
            for tensor in tree_leaves((args, kwargs)):
                share *= density.get(_storage(tensor), 1.0)
            found[where[-1]][0] += flops
            found[where[-1]][1] += flops * share
            return flops

        count._get_raw = True  # type: ignore[attr-defined]  # the tensors, not their shapes alone
        return count

    mapping = {operator: counted(formula) for operator, formula in flop_registry.items()}
    with ExitStack() as stack:
        for context in (undisturbed(module), _without_fused_recurrence(module), plain_attention()):
            stack.enter_context(context)
        stack.enter_context(following(module, where.append, where.pop))
        # With gradients: without, torch's counter stumbles over a module that returns a parameter as it is.
        stack.enter_context(FlopCounterMode(display=False, custom_mapping=mapping))
        call(module)
    return {name: (flops, effective) for name, (flops, effective) in found.items()}


def _densities(nonzero: Mapping[nn.Parameter, int]) -> dict[int, float]:
    """Return the share of nonzero entries of each weight that has zeros, by where its data lies.

    Not of biases: they are added, and multiply nothing.
    """
    return {
        _storage(parameter): count / parameter.numel()
        for parameter, count in nonzero.items()
        if parameter.ndim > 1 and count < parameter.numel()
    }


def _storage(tensor: Any) -> int:
    return local(tensor).untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0


@contextmanager
def _without_fused_recurrence(module: nn.Module) -> Iterator[None]:
    """Run recurrent layers by the matrix products that they consist of; the fused operator counts nothing."""
    before = torch.backends.mkldnn.enabled
    try:
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        yield
    finally:
        torch.backends.mkldnn.enabled = before
