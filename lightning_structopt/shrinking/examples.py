"""What a module is traced with while it trains."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_structopt._devices import device_of, moved
from lightning_structopt.profiling.inputs import Call, inputs_of
from lightning_structopt.shrinking.plan import as_tuple

_SAMPLES = 2  # as few as batch norm can train with


def example_for(module: nn.Module, given: Any, batch: Any, owner: str = "ChannelPruning") -> tuple[Any, ...]:
    """Return arguments of the module's ``forward``, on its device.

    Args:
        module: The module.
        given: What the user gave, if anything. Without it: the module's ``example_input_array``, or else the inputs
            of two samples of ``batch``.
        batch: A batch of training data: inputs, or a tuple or list that begins with them.
        owner: The callback that asks.

    Raises:
        TypeError: If they are keywords, or the batch has no tensors as inputs.
    """
    example = getattr(module, "example_input_array", None) if given is None else given
    inputs = inputs_of(batch) if example is None else example
    _require_positional(inputs, owner)
    found = as_tuple(moved(inputs, device_of(module)))
    return Call(found, {}).with_batch_size(_SAMPLES).args if example is None else found


def _require_positional(inputs: Any, owner: str) -> None:
    if isinstance(inputs, dict) or not any(isinstance(each, Tensor) for each in tree_leaves(inputs)):
        raise TypeError(
            f"`{owner}` traces `forward` with an example input: a tensor, or a tuple of its arguments. Found "
            f"`{type(inputs).__name__}`. Give `example_input`, or set `example_input_array` of the module."
        )
