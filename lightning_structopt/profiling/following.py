"""Which submodule is running, at each moment of a forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def following(
    module: nn.Module, enter: Callable[[str], object], leave: Callable[[], object]
) -> Iterator[None]:
    """Call ``enter`` with the name of each submodule that starts, and ``leave`` when it is done.

    Args:
        module: Its hooks are as they were afterwards.
        enter: Called with the name, which is empty for the module itself.
        leave: Called also when the submodule raises.
    """
    handles = []

    def entering(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            enter(name)

        return hook

    def leaving(*_: object) -> None:
        leave()

    try:
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(entering(name), prepend=True))
            handles.append(part.register_forward_hook(leaving, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
