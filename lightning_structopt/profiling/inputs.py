"""What a module is called with: one tensor, several, or keywords."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_structopt._checks import require_whole


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        """Run ``module``."""
        return module(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Return all tensors among the arguments."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int:
        """The size of dimension 0 of the first tensor; 0 where there is none."""
        sizes = [len(tensor) for tensor in self.tensors() if _is_batch(tensor)]
        return sizes[0] if sizes else 0

    def with_batch_size(self, size: int) -> "Call":
        """Return the same call with so many samples, which repeat where there are not enough.

        Raises:
            TypeError: If ``size`` is not a whole number.
            ValueError: If ``size`` is below 1, or the arguments have no batch dimension.
        """
        require_whole("batch_size", size, 1)
        here = self.batch_size
        if here == 0:
            raise ValueError(
                "`batch_sizes` needs inputs with a batch as dimension 0. Found none. Leave it out, or give tensors."
            )

        def resize(value: Any) -> Any:
            if not _is_batch(value) or len(value) != here:  # a mask or a table that all samples share
                return value
            return value[torch.arange(size, device=value.device) % here]

        return Call(tree_map(resize, self.args), tree_map(resize, dict(self.kwargs)))


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 0


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch: what a tuple or list begins with, or all of it."""
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def as_call(module: nn.Module, example_input: Any) -> Call:
    """Take ``example_input`` as arguments of ``module``: a tensor, a tuple of arguments, or a dict of keywords.

    Raises:
        TypeError: If the module's forward pass takes other arguments.
        ValueError: If a tensor is on another device than the module.
    """
    if example_input is None:
        raise TypeError(
            "`example_input` must be what the module is called with. Found None. Give a tensor, a tuple of "
            "arguments, or a dict of keyword arguments."
        )
    if isinstance(example_input, dict):
        call = Call((), example_input)
    else:
        call = Call(
            tuple(example_input) if isinstance(example_input, (tuple, list)) else (example_input,), {}
        )
    _require_signature(module, call)
    _require_device(module, call)
    return call


def _require_signature(module: nn.Module, call: Call) -> None:
    """Raise unless the forward pass of ``module`` takes the arguments of ``call``.

    Raises:
        TypeError: If it doesn't.
    """
    signature = inspect.signature(module.forward)
    try:
        signature.bind(*call.args, **call.kwargs)
    except TypeError as error:
        names = [*(f"argument {i + 1}" for i in range(len(call.args))), *call.kwargs]
        raise TypeError(
            f"`example_input` must fit `{type(module).__name__}.forward{signature}`. Found {', '.join(names)}: "
            f"{error}. Give a tuple of arguments, or a dict of keyword arguments."
        ) from None


def _require_device(module: nn.Module, call: Call) -> None:
    """Raise unless the tensors of ``call`` are where ``module`` is.

    Raises:
        ValueError: If they aren't.
    """
    homes = {parameter.device for parameter in module.parameters()}
    found = {tensor.device for tensor in call.tensors()}
    if len(homes) == 1 and found - homes:
        raise ValueError(
            f"`example_input` must be on the module's device. Found {', '.join(sorted(map(str, found)))} for a module "
            f"on {homes.pop()}. Move one of them with `.to(...)`."
        )


def gpu_of(module: nn.Module, call: Call) -> torch.device | None:
    """Return the first GPU that the module or its arguments are on; None if there is none."""
    tensors = chain(module.parameters(), call.tensors())
    return next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
