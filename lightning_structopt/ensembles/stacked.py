"""Members of one class as one vectorized forward pass, where that is faster than one after another."""

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import Self, override

from lightning_structopt._undisturbed import plain_attention, without_fast_path
from lightning_structopt.ensembles.batches import as_inputs, call, tensor_of, together
from lightning_structopt.profiling.latency import latency

Output: TypeAlias = Callable[[Any], Tensor]  # from what a member returns
Stack: TypeAlias = Literal["auto"] | bool
_Slot: TypeAlias = tuple[dict[str, Any], str]
_SECONDS = 0.02  # of timing each way
_GAIN = 0.9  # what the time of one by one must be multiplied by to be worth it


class OneByOne(nn.Module):
    """Runs each member.

    Args:
        members: Any modules.
        output: From what one returns to its tensor.
    """

    def __init__(self, members: Sequence[nn.Module] | nn.ModuleList, output: Output = tensor_of) -> None:
        super().__init__()
        self.members = _listed(members)
        self._output = output

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = as_inputs(args, kwargs)
        return together([self._output(call(member, inputs)) for member in self.members])


def _listed(members: Sequence[nn.Module] | nn.ModuleList) -> nn.ModuleList:
    """Return ``members`` as a list of modules; the very one that is given, so that it may change."""
    return members if isinstance(members, nn.ModuleList) else nn.ModuleList(members)


class AllAtOnce(nn.Module):
    """Runs all members as one, by :func:`torch.func.vmap` over copies of their weights.

    Args:
        members: Modules of one class that differ in nothing but the values of parameters and buffers.
        output: From what one returns to its tensor.

    Raises:
        ValueError: If they differ in more, as far as their classes, settings and shapes show.
    """

    def __init__(self, members: Sequence[nn.Module] | nn.ModuleList, output: Output = tensor_of) -> None:
        super().__init__()
        if (reason := why_not(members)) is not None:
            raise ValueError(
                "`stack=True` runs members as one, so they must differ in their weights only. Found "
                f'{reason}. Give `stack="auto"` or `stack=False`.'
            )
        self.members = _listed(members)
        self._output = output
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        self._slots: list[list[_Slot]] = []  # by member
        self._stacks: list[Tensor] = []
        self._copied: list[tuple[int, int]] = []
        self._held: list[Tensor] = []  # so that nothing else comes to lie where they did

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._refresh()
        inputs, base = as_inputs(args, kwargs), self.members[0]

        def one(values: list[Tensor]) -> Tensor:
            with _holding(self._slots[0], values):
                return self._output(call(base, inputs))

        with plain_attention(), without_fast_path():
            outputs: Tensor = vmap(one)(self._stacks)
        return outputs

    def _refresh(self) -> None:
        """Copy the weights anew if they have been moved, changed or replaced since."""
        if not self._slots or any(tuple(now.values()) != then for now, then in self._children):
            self._children = [(part._modules, tuple(part._modules.values())) for part in self.modules()]
            self._slots = [_slots_of(member) for member in self.members]
        # Each pass comes through here, so it has to be quick beside small members.
        tensors = [[kind[name] for kind, name in slots] for slots in self._slots]
        now = [(tensor.data_ptr(), tensor._version) for held in tensors for tensor in held]
        if now != self._copied:
            # In inference mode the copies would be no good outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self._stacks = [torch.stack(same) for same in zip(*tensors, strict=True)]
            self._copied = now
            self._held = [tensor.detach() for held in tensors for tensor in held]


def _slots_of(module: nn.Module) -> list[_Slot]:
    """Return where the parameters and buffers of ``module`` are kept."""
    return [
        (kept, name)
        for part in module.modules()
        for kept in (part._parameters, part._buffers)
        for name, tensor in kept.items()
        if tensor is not None
    ]


@contextmanager
def _holding(slots: list[_Slot], values: list[Tensor]) -> Iterator[None]:
    """Put ``values`` in the slots for a while; ``torch.func.functional_call`` takes several times as long."""
    before = [kept[name] for kept, name in slots]
    try:
        for (kept, name), value in zip(slots, values, strict=True):
            kept[name] = value
        yield
    finally:
        for (kept, name), value in zip(slots, before, strict=True):
            kept[name] = value


def why_not(members: Sequence[nn.Module] | nn.ModuleList) -> str | None:
    """Return what keeps ``members`` from being run as one, or None."""
    if len(members) < 2:
        return "a single member"
    first = members[0]
    for index, member in enumerate(members):
        if type(member) is not type(first) or repr(member) != repr(first):
            return f"another architecture in member {index} than in member 0"
        if _shapes(member) != _shapes(first):
            return f"other shapes, types or devices in member {index} than in member 0"
    if any(
        type(t.detach()) is not Tensor or t.is_inference() for m in members for t in _state_of(m).values()
    ):
        return "weights that aren't plain tensors"
    return None


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {name: (t.shape, t.dtype, t.device) for name, t in _state_of(module).items()}


class Runner:
    """Runs members in the way that is faster for inputs of that size.

    With ``"auto"`` both ways are timed at the first batch of each size (to the next power of two) on each device;
    the vectorized one is taken where it is clearly faster and its outputs are the same to rounding.

    Args:
        members: Any modules, the owner's own list. This is no module.
        stack: ``"auto"``, True for always, False for never.
        output: From what a member returns to its tensor.

    Raises:
        ValueError: If ``stack`` is True and members can't run as one.
    """

    def __init__(self, members: nn.ModuleList, stack: Stack, output: Output = tensor_of) -> None:
        self.members = members
        self.stack = stack
        self.output = output
        self._one_by_one = OneByOne(members, output)
        self._all_at_once = AllAtOnce(members, output) if stack is True else None
        self._is_faster: dict[Hashable, bool] = {}

    def __call__(self, inputs: Any, *, reproducible: bool) -> Tensor:
        """Return the outputs of all members, (M, N, ...).

        Args:
            inputs: A tensor, a tuple of arguments or a dict of named ones.
            reproducible: Whether the way may not depend on a clock.

        Raises:
            ValueError: If ``stack`` is True and running as one gives other outputs.
        """
        # An exporter or a counter of operations is to see the members themselves.
        if self.stack is False or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            return self._run(self._one_by_one, inputs)
        if self.stack is True:
            return self._verified(inputs)
        if reproducible or not self._faster_at_once(inputs):
            return self._run(self._one_by_one, inputs)
        assert self._all_at_once is not None
        return self._run(self._all_at_once, inputs)

    @override
    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return type(self), (
            self.members,
            self.stack,
            self.output,
        )  # what was measured belongs to this machine

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.members, memo), self.stack, self.output)

    def _run(self, way: nn.Module, inputs: Any) -> Tensor:
        outputs: Tensor = call(way, inputs)
        return outputs

    def _verified(self, inputs: Any) -> Tensor:
        assert self._all_at_once is not None
        outputs = self._run(self._all_at_once, inputs)
        key = self._key(inputs)
        if key not in self._is_faster:
            if not _same(outputs, self._run(self._one_by_one, inputs)):
                raise ValueError(
                    "`stack=True` runs members as one, so they must differ in their weights only. Found other outputs "
                    'than one by one, so their `forward` differs in something else. Give `stack="auto"` or False.'
                )
            self._is_faster[key] = True
        return outputs

    def _faster_at_once(self, inputs: Any) -> bool:
        key = self._key(inputs)
        if key not in self._is_faster:
            self._is_faster[key] = self._measure(inputs)
        return self._is_faster[key]

    @torch.no_grad()
    def _measure(self, inputs: Any) -> bool:
        if why_not(self.members) is not None:
            return False
        if self._all_at_once is None:
            self._all_at_once = AllAtOnce(self.members, self.output)
        expected = self._run(self._one_by_one, inputs)
        try:
            with warnings.catch_warnings():
                # What has no rule is looped over after all.
                warnings.filterwarnings("error", message=".*batching rule")
                if not _same(self._run(self._all_at_once, inputs), expected):
                    return False
            at_once = latency(self._all_at_once, inputs, seconds=_SECONDS).median_ms
        except Exception:  # whatever a user's module may raise when it is vectorized
            return False
        return at_once < _GAIN * latency(self._one_by_one, inputs, seconds=_SECONDS).median_ms

    def _key(self, inputs: Any) -> Hashable:
        first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
        first = first[0] if isinstance(first, tuple) else first
        if not isinstance(first, Tensor) or first.ndim == 0:
            return None
        precision = torch.is_autocast_enabled(first.device.type)
        return first.device, precision, (len(first) - 1).bit_length(), first.shape[1:]


def _same(one: Tensor, other: Tensor) -> bool:
    # Half precision rounds at other places in the other order.
    tolerance = 1e-5 if one.dtype in {torch.float32, torch.float64} else 1e-2
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)
