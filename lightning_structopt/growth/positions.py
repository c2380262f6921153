"""Places where a layer can be added: what runs there, and which operators make and read its output."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_structopt._undisturbed import evaluating, without_fast_path

_CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm),
)
_Operator = tuple[str, tuple[Any, ...]]  # the name and the plain arguments


@dataclass
class Position:
    """The output of a submodule.

    Args:
        name: Of the submodule.
        shape: Of its output.
        made_by: The operator that made it.
        last: The shape of what the last layer before it made, if that had channels in dimension 1.
        read_by: The operators that read it, up to one that writes over it.
    """

    name: str
    shape: tuple[int, ...]
    made_by: _Operator
    last: tuple[int, ...]
    read_by: list[_Operator] = field(default_factory=list)
    closed: bool = False

    @property
    def places(self) -> int:
        """How many dimensions of places follow the channels; 0 if features are last."""
        if len(self.shape) < 3 or not self.last:
            return 0
        channels = self.last[1]
        # Patches of an image are taken for tokens once their channels are last.
        image = self.shape[1] == channels or (
            self.shape[-1] != channels and len(self.shape) == len(self.last)
        )
        return len(self.shape) - 2 if image else 0

    @property
    def width(self) -> int:
        """How many features or channels there are."""
        return self.shape[1] if self.places else self.shape[-1]

    @property
    def activation(self) -> tuple[_Operator, bool] | None:
        """The activation that makes the output, or the only operator that reads it, and whether it is the latter.

        Only those that leave their own results as they are.
        """
        if bounds_of(self.made_by) is not None:
            return self.made_by, False
        readers = {str(each): each for each in self.read_by}
        if len(readers) == 1:
            reader = next(iter(readers.values()))
            if bounds_of(reader) is not None:
                return reader, True
        return None


def bounds_of(operator: _Operator) -> tuple[float, ...] | None:
    """Return what an activation cuts off at; None for other operators than ReLU and its like."""
    name, arguments = operator
    if name == "relu":
        return (0.0,)
    if name == "hardtanh":
        low, high = [*arguments, -1.0, 1.0][:2] if len(arguments) != 1 else (arguments[0], 1.0)
        return float(low), float(high)
    return None


def positions(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Position]:
    """Run a module, and return the positions by the names of submodules that return a tensor, in the order they end.

    Args:
        module: The module; left as it is.
        inputs: The arguments of its ``forward``.
    """
    watched = copy.deepcopy(module)
    log = _Log()
    for name, part in watched.named_modules():
        part.register_forward_hook(log.hook(name))
    with evaluating(watched), without_fast_path(), torch.no_grad(), log:
        watched(*inputs)
    return log.found


class _Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers which operators made and read the outputs of submodules."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, Position] = {}
        self._made: dict[int, _Operator] = {}
        self._watched: dict[int, list[Position]] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the number of one
        self._last: tuple[int, ...] = ()

    def hook(self, name: str) -> Any:
        """Return the forward hook of a submodule."""

        def ended(part: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(getattr(part, "weight", None), nn.Parameter):
                self._last = tuple(output.shape) if isinstance(part, _CHANNELS_FIRST) else ()
            if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 1:
                made = self._made.get(id(output), ("the input", ()))
                position = Position(name, tuple(output.shape), made, self._last)
                self.found.pop(name, None)  # a module may run twice: its last place counts
                self.found[name] = position
                self._watched.setdefault(id(output), []).append(position)
                self._alive.append(output)

        return ended

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.rpartition("::")[2]
        operator = (name.rstrip("_"), tuple(each for each in args if isinstance(each, (int, float))))
        given = [each for each in _flat(args) if isinstance(each, Tensor)]
        for position in (p for tensor in given for p in self._watched.get(id(tensor), ()) if not p.closed):
            position.read_by.append(operator)
        if func._schema.is_mutable and given:
            for position in self._watched.get(id(given[0]), ()):
                position.closed = True
        result = func(*args, **(kwargs or {}))
        for tensor in _flat((result,)):
            if isinstance(tensor, Tensor):
                self._made[id(tensor)] = operator
                self._alive.append(tensor)
        return result


def _flat(values: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    found: list[Any] = []
    for each in values:
        found.extend(_flat(each) if isinstance(each, (tuple, list)) else [each])
    return found
