"""The most memory that a forward pass or a training step holds besides the module itself."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_structopt._undisturbed import undisturbed
from lightning_structopt.profiling.following import following
from lightning_structopt.profiling.inputs import Call, gpu_of


def forward_bytes(module: nn.Module, call: Call) -> tuple[int, dict[str, int]]:
    """Return the memory of a forward pass without gradients.

    Returns:
        The peak, that is of activations that live at the same time; and by the name of the submodule, what its own
        operators bring about, whether or not it lives on.
    """
    allocations = _Allocations()

    def run() -> None:
        with torch.no_grad(), following(module, allocations.where.append, allocations.where.pop):
            call(module)

    with undisturbed(module):
        return _peak(module, call, run, allocations), dict(allocations.by_name)


def training_bytes(module: nn.Module, call: Call) -> int:
    """Return the peak of memory of a forward and a backward pass: activations kept for it, and gradients.

    The loss is the sum of squares of all outputs. What an optimizer keeps is its own affair: Adam's is twice the
    size of the trainable parameters.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def run() -> None:
        module.train()
        outputs = [t for t in tree_leaves(call(module)) if isinstance(t, Tensor) and t.requires_grad]
        if outputs and trained:
            loss = torch.stack([output.float().square().sum() for output in outputs]).sum()
            torch.autograd.grad(loss, trained, allow_unused=True)

    with undisturbed(module):
        return _peak(module, call, run, _Allocations())


def _peak(module: nn.Module, call: Call, run: Callable[[], None], allocations: "_Allocations") -> int:
    device = gpu_of(module, call)
    if device is None:
        with allocations:
            run()
        return allocations.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with allocations:
        run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that operators bring about, for as long as they live.

    Scratch memory within an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.where = [""]  # names of the submodules that are running, the innermost last
        self.by_name: Counter[str] = Counter()
        self._now = 0
        self._alive: set[int] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place in self._alive:
            return
        self._alive.add(place)
        self._now += storage.nbytes()
        self.by_name[self.where[-1]] += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, place, storage.nbytes())

    def _remove(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self._now -= size
