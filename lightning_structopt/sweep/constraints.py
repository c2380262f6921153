"""What a candidate may cost, checked before its first training step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt._devices import device_of, moved
from lightning_structopt.profiling import latency
from lightning_structopt.profiling.flops import count_flops
from lightning_structopt.profiling.inputs import Call, as_call, inputs_of
from lightning_structopt.profiling.weights import count_nonzero, own_tensors, size_bytes

Costs = Mapping[str, float]
_SECONDS = 0.02  # of timing a forward pass


class Constraint(ABC):
    """A bound on one of the costs: ``parameters``, ``bytes``, ``flops`` or ``latency_ms``."""

    @abstractmethod
    def reason(self, costs: Costs) -> str | None:
        """Return why a candidate of these costs may not train; None if it may."""


def _above(costs: Costs, name: str, bound: float, what: str) -> str | None:
    if name not in costs:
        return f"{what} can't be measured: its forward pass takes no part of the batch. Set `example_input_array`."
    return None if costs[name] <= bound else f"{_number(costs[name])} {what}, more than {_number(bound)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class MaxParameters(Constraint):
    """Refuses candidates of more parameters.

    Args:
        count: The most that there may be, at least 1.

    Raises:
        TypeError: If ``count`` is not a whole number.
        ValueError: If it is below 1.

    Example:
        >>> MaxParameters(1000).reason({"parameters": 1010})
        '1,010 parameters, more than 1,000'
    """

    count: int

    def __post_init__(self) -> None:
        require_whole("count", self.count, 1)

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "parameters", self.count, "parameters")


@dataclass(frozen=True)
class MaxBytes(Constraint):
    """Refuses candidates whose parameters and buffers take more memory.

    Args:
        size_bytes: The most that they may take, at least 1.

    Raises:
        TypeError: If ``size_bytes`` is not a whole number.
        ValueError: If it is below 1.
    """

    size_bytes: int

    def __post_init__(self) -> None:
        require_whole("size_bytes", self.size_bytes, 1)

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "bytes", self.size_bytes, "bytes")


@dataclass(frozen=True)
class MaxFLOPs(Constraint):
    """Refuses candidates whose forward pass takes more floating-point operations for one sample.

    Args:
        flops: The most that it may take, above 0.

    Raises:
        TypeError: If ``flops`` is not a number.
        ValueError: If it is not positive.
    """

    flops: float

    def __post_init__(self) -> None:
        require_in("flops", self.flops, 0, float("inf"), closed="neither")

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "flops", self.flops, "FLOPs")


@dataclass(frozen=True)
class MaxLatency(Constraint):
    """Refuses candidates whose forward pass takes longer for one sample, on the device that they train on.

    Args:
        milliseconds: The longest that it may take (the median), above 0.

    Raises:
        TypeError: If ``milliseconds`` is not a number.
        ValueError: If it is not positive.
    """

    milliseconds: float

    def __post_init__(self) -> None:
        require_in("milliseconds", self.milliseconds, 0, float("inf"), closed="neither")

    @override
    def reason(self, costs: Costs) -> str | None:
        return _above(costs, "latency_ms", self.milliseconds, "ms")


Rule = Constraint | Callable[[Any], str | None]


def as_rules(constraints: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return ``constraints``, checked.

    Raises:
        TypeError: If one is neither a constraint nor a callable.
    """
    for rule in constraints:
        if isinstance(rule, type) or not (isinstance(rule, Constraint) or callable(rule)):
            raise TypeError(
                "`constraints` must be `Constraint` objects or functions from a module to the reason why it may not "
                f"train (None if it may). Found {rule!r}."
            )
    return tuple(constraints)


def first_reason(rules: Sequence[Rule], module: nn.Module, costs: Costs) -> str | None:
    """Return the first reason why ``module`` may not train.

    Raises:
        TypeError: If a rule returns something else than text or None.
    """
    for rule in rules:
        found = rule.reason(costs) if isinstance(rule, Constraint) else rule(module)
        if found is not None and not isinstance(found, str):
            raise TypeError(
                f"A constraint must return the reason why a module may not train, or None. Found {found!r}."
            )
        if found:
            return found
    return None


def measure(module: nn.Module, batch: Any) -> dict[str, float]:
    """Return what ``module`` costs; operations and time for one sample of ``batch``, if its forward pass takes it."""
    own = [(parameters, buffers) for _, _, parameters, buffers in own_tensors(module)]
    costs: dict[str, float] = {
        "parameters": sum(p.numel() for parameters, _ in own for p in parameters),
        "bytes": sum(size_bytes(t) for parameters, buffers in own for t in [*parameters, *buffers]),
    }
    call = _one_sample(module, batch)
    if call is not None:
        try:
            flops = count_flops(module, call, {p: count_nonzero(p) for p in module.parameters()})
            timed = latency(module, call.args, seconds=_SECONDS)
        except Exception:  # whatever a forward pass raises that is meant for other arguments
            return costs
        costs |= {"flops": sum(dense for dense, _ in flops.values()), "latency_ms": timed.median_ms}
    return costs


def _one_sample(module: nn.Module, batch: Any) -> Call | None:
    example = getattr(module, "example_input_array", None)
    if example is None:
        example = inputs_of(batch)
    try:
        call = as_call(
            module, (moved(example, device_of(module)),) if not isinstance(example, tuple) else example
        )
        return call.with_batch_size(1) if tree_leaves(call.args) else None
    except (TypeError, ValueError):
        return None
