"""Whether a grown module computes what it did before."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, nn
from torch.utils._pytree import tree_map

from lightning_structopt._undisturbed import evaluating
from lightning_structopt.shrinking.verify import difference, outputs_of


def in_full(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Return a copy of a module and its inputs in float32 if some of it is in less, in which dividing rounds."""
    low = {float16, bfloat16}
    if not any(each.dtype in low for each in module.parameters()):
        return module, inputs
    return copy.deepcopy(module).float(), tree_map(
        lambda each: each.float() if _is_low(each) else each, inputs
    )


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in {float16, bfloat16}


class Comparison:
    """Compares grown modules with the module that they come from.

    Args:
        module: The module; left as it is.
        inputs: The arguments of its ``forward``.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._module, self._inputs = in_full(module, inputs)
        self._expected = {False: outputs_of(copy.deepcopy(self._module), self._inputs)}
        trained = self._trained()
        if trained is not None:
            self._expected[True] = trained

    def grown(self, grow: Callable[[nn.Module], Any]) -> nn.Module:
        """Return a grown copy of the module.

        Args:
            grow: Changes a module, where it is.
        """
        copied = copy.deepcopy(self._module)
        grow(copied)
        return copied

    def run(self, grown: nn.Module) -> None:
        """Run a grown module itself in evaluation, so that what an error says of its parts is known."""
        outputs_of(grown, self._inputs)

    def call(self, grown: nn.Module) -> None:
        """Run a grown module as users do in evaluation: the fast paths of attention ask parts for their weights."""
        with evaluating(grown), torch.no_grad(), torch.random.fork_rng([]):
            grown(*self._inputs)

    def gap(self, grown: nn.Module) -> float:
        """Return the largest difference of outputs in evaluation and in training, relative to the largest number."""
        return max(
            difference(self._module, expected, grown, self._inputs, training)
            for training, expected in self._expected.items()
        )

    def _trained(self) -> list[Tensor] | None:
        try:
            return outputs_of(copy.deepcopy(self._module), self._inputs, training=True)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):  # of a batch norm, for a batch of one
                return None
            raise
