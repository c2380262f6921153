"""Letting go of a module after training."""

from typing import Any

from torch.utils.hooks import RemovableHandle
from typing_extensions import override


def release(callback: Any) -> None:
    """Remove what Lightning attached to ``callback``: bound methods that would keep the module in memory.

    Args:
        callback: A ``lightning.pytorch.Callback`` whose run is over. The next run attaches them again.
    """
    for attached in ("log", "log_dict"):
        vars(callback).pop(attached, None)


class LetsGo:
    """What a callback does when its run is over, or broken off. It goes before ``Callback`` among the bases."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go."""
        self._let_go()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go."""
        self._let_go()

    def _let_go(self) -> None:
        """Forget the module, its optimizers and whatever watches them."""
        release(self)


class HearsLoading(LetsGo):
    """Likewise, for a callback that listens to a module loading its weights, from ``setup`` until the fit starts."""

    _handle: RemovableHandle | None = None

    def _listen(self, handle: RemovableHandle) -> None:
        self._stop_listening()
        self._handle = handle

    def _stop_listening(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @override
    def _let_go(self) -> None:
        self._stop_listening()
        super()._let_go()
