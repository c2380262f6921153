"""Running a module to look at it, and leaving no trace."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put ``module`` into training or evaluation mode, and each of its parts back into its own afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def evaluating(module: nn.Module) -> AbstractContextManager[None]:
    """Put ``module`` into evaluation mode, and each of its parts back into its own afterwards."""
    return in_mode(module, training=False)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run attention as its modules say: the fast path goes around those within, or hands them nested tensors."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def without_autocast() -> Iterator[list[Any]]:
    """Let regions of ``torch.autocast`` in a ``forward`` do nothing, and give those that were met.

    Half precision rounds too much to compare outputs, and ``torch.export`` makes graphs within the graph of them.
    """
    kind: Any = torch.autocast
    enter, leave = kind.__enter__, kind.__exit__
    met: list[Any] = []

    def note(region: Any) -> Any:
        met.append(region)
        return region

    try:
        kind.__enter__, kind.__exit__ = note, lambda region, *error: None
        yield met
    finally:
        kind.__enter__, kind.__exit__ = enter, leave


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode, with gradients and reproducible randomness, and restore all after."""
    buffers = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    with ExitStack() as stack:
        for context in (_same_randomness(module), _uncompiled(module), _without_cudnn_for_recurrence(module)):
            stack.enter_context(context)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(evaluating(module))
        stack.enter_context(without_fast_path())
        try:
            yield
        finally:
            with torch.no_grad():
                for part, name, buffer, value in buffers:
                    part._buffers[name] = buffer.copy_(value)


def compiled_parts(module: nn.Module) -> list[str]:
    """Return the names of those submodules, itself included, that ``torch.compile`` has to do with."""
    return [
        name
        for name, part in module.named_modules()
        # The wrapper; `module.compile()`; and what Lightning makes of a compiled LightningModule.
        if type(part).__name__ == "OptimizedModule"
        or getattr(part, "_compiled_call_impl", None) is not None
        or getattr(part, "_compiler_ctx", None) is not None
    ]


@contextmanager
def _uncompiled(module: nn.Module) -> Iterator[None]:
    """Run without what is compiled, which leaves out new hooks and can't be differentiated twice."""
    if not compiled_parts(module):  # as asking for it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let the frozen ones among ``parameters`` have gradients for a while."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _same_randomness(module: nn.Module) -> Iterator[None]:
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(0)
        yield


@contextmanager
def _without_cudnn_for_recurrence(module: nn.Module) -> Iterator[None]:
    """Let recurrent layers be differentiated, which cuDNN's can't in evaluation mode, nor twice."""
    before = torch.backends.cudnn.enabled
    try:
        if any(isinstance(part, nn.RNNBase) for part in module.modules()):
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = before


def plain_attention() -> AbstractContextManager[None]:
    """Run attention by the kernel that can be differentiated twice and by :func:`torch.func.vmap`."""
    return sdpa_kernel(SDPBackend.MATH)
