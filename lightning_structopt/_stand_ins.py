"""LightningModules in the place of others, as everyone but their own package sees them."""

from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def original_of(module: _Module) -> _Module:
    """Return the module that ``module`` stands in for before the trainer, such as a student; by default itself.

    What outlives the training is about the original: plans name its class, and smaller modules are of it.
    """
    original: _Module = getattr(module, "stands_in_for", module)
    return original
