"""What a candidate may cost, checked before its first training step."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_structopt._checks import require_list
from lightning_structopt._devices import device_of, moved
from lightning_structopt.profiling import latency
from lightning_structopt.profiling.bounds import Constraint, Costs
from lightning_structopt.profiling.flops import count_flops
from lightning_structopt.profiling.inputs import Call, as_call, inputs_of
from lightning_structopt.profiling.weights import count_nonzero, own_tensors, size_bytes

_SECONDS = 0.02  # of timing a forward pass
Rule = Constraint | Callable[[Any], str | None]


def as_rules(constraints: Sequence[Rule]) -> tuple[Rule, ...]:
    """Return ``constraints``, checked.

    Raises:
        TypeError: If one is neither a constraint nor a callable.
    """
    require_list("constraints", constraints)
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
        example = moved(example, device_of(module))
        call = as_call(module, example if isinstance(example, tuple) else (example,))
        return call.with_batch_size(1) if tree_leaves(call.args) else None
    except (TypeError, ValueError):
        return None
