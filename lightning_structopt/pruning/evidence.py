"""What a criterion wants to know is collected while the module trains."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_structopt._dtensors import full, local, part_of
from lightning_structopt._precision import widened
from lightning_structopt.pruning.criteria import Criterion, Evidence
from lightning_structopt.pruning.gradient_criteria import GradientCriterion
from lightning_structopt.pruning.sharding import Sharding
from lightning_structopt.pruning.wanda import Wanda, remove, watch_inputs


class EvidenceCollector:
    """Adds up, for one criterion, what training shows of a set of weights.

    Criteria that look at weights only, or have a calibration set, cost nothing. Others take one tensor as
    large as the weights and one pass over gradients a step (or, for :class:`Wanda`, over inputs).

    Totals of a gradient criterion are alike on all ranks, or parts as their parameters are; sums of squared
    inputs are each rank's own until they are put together.

    Args:
        criterion: Whom it is for.
        parameters: The weights by name. They are referred to, never replaced.
    """

    def __init__(self, criterion: Criterion, parameters: Mapping[str, nn.Parameter]) -> None:
        self.criterion = criterion
        self.parameters = dict(parameters)
        self._totals: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._used: set[str] = set()  # what the last step of the ramp saw; replaced once there is news
        self._handles: list[RemovableHandle] = []

    @property
    def _takes_gradients(self) -> bool:
        return isinstance(self.criterion, GradientCriterion) and self.criterion.calibration is None

    @property
    def _takes_inputs(self) -> bool:
        return isinstance(self.criterion, Wanda) and self.criterion.calibration is None

    @property
    def waits(self) -> bool:
        """Whether the criterion wants to see training and has seen nothing of it."""
        return (self._takes_gradients or self._takes_inputs) and not self._steps

    @property
    def has_all(self) -> bool:
        """Whether something is known of every weight."""
        return self._steps.keys() == self.parameters.keys()

    def attach(self, module: nn.Module) -> None:
        """Watch the inputs of layers of ``module`` if the criterion wants them.

        Raises:
            ValueError: If the criterion can't score the weights of ``module``.
        """
        self.detach()
        self.criterion.require(module, self.parameters)
        if self._takes_inputs:
            self._handles = watch_inputs(module, self.parameters, self._add_squares)

    def detach(self) -> None:
        """Stop watching."""
        remove(self._handles)
        self._handles = []

    @torch.no_grad()
    def observe_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the gradients of those weights that are among ``parameters``.

        Call it before each optimizer step with all parameters of that optimizer, when their gradients are
        unscaled and before any is masked or clipped. A parameter that is trained but has no gradient took no
        part in the step, which counts as a gradient of zero. A step with a gradient that is not finite, which
        a gradient scaler is about to skip, does not count.
        """
        if not self._takes_gradients:
            return
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        stepped = {names[id(p)]: p for p in parameters if id(p) in names and p.requires_grad}
        gradients = {name: dense(p.grad) for name, p in stepped.items() if p.grad is not None}
        if not all_finite(gradients.values()):
            return
        assert isinstance(self.criterion, GradientCriterion)
        for name, parameter in stepped.items():
            weight = widened(local(parameter.detach()))
            total = self._next_total(name, weight)
            if name in gradients:
                self.criterion.accumulate(total, weight, widened(gradients[name]))

    def _add_squares(self, name: str, squares: Tensor) -> None:
        self._next_total(name, squares).add_(squares)

    def _next_total(self, name: str, like: Tensor) -> Tensor:
        """Return the total of ``name`` for one more step to be added to."""
        if name in self._used:
            self._used.discard(name)
            self._totals[name].zero_()
            self._steps[name] = 0
        if name not in self._totals:
            self._totals[name] = torch.zeros_like(like)
        self._steps[name] = self._steps.get(name, 0) + 1
        return self._totals[name]

    def evidence(self, module: nn.Module, sharding: Sharding) -> Evidence:
        """Return what is known; all ranks call it together.

        Args:
            module: The module that holds the weights.
            sharding: How they are spread over ranks.
        """
        evidence = Evidence(module, sharding=sharding, group=_all_ranks())
        steps = self._steps_everywhere(evidence.group)
        totals = {name: self._totals[name] for name in steps}
        if evidence.group is not None:
            # Gradients are averaged already; this makes up for strategies and hooks that leave them apart.
            ranks = evidence.group.size() if self._takes_gradients else 1
            totals |= {
                name: evidence.sum_over_ranks(totals[name]) / ranks
                for name in steps
                if self._takes_inputs or name not in sharding.sharded
            }
        return replace(evidence, totals=totals, steps=steps)

    def _steps_everywhere(self, group: dist.ProcessGroup | None) -> dict[str, int]:
        """Return the names of which every rank has a total, and the fewest steps that are in one."""
        if not (self._takes_gradients or self._takes_inputs):
            return {}
        counts = [self._steps.get(name, 0) for name in self.parameters]
        if group is not None:
            device = next(iter(self.parameters.values())).device
            reduced = torch.tensor(counts, device=device)
            dist.all_reduce(reduced, dist.ReduceOp.MIN, group=group)
            counts = reduced.tolist()
        return {name: count for name, count in zip(self.parameters, counts, strict=True) if count}

    def forget(self) -> None:
        """Start anew after a step of the ramp, where the criterion does so.

        What is known of a weight is kept until there is something newer: its optimizer may not step before the
        next step of the ramp.
        """
        if not isinstance(self.criterion, GradientCriterion) or self.criterion.starts_anew:
            self._used = set(self._totals)

    @property
    def shares_state(self) -> bool:
        """Whether ranks have different parts, so that all must call :meth:`state_dict` together."""
        sharded = any(isinstance(parameter, DTensor) for parameter in self.parameters.values())
        return _all_ranks() is not None and (self._takes_inputs or (self._takes_gradients and sharded))

    def state_dict(self) -> dict[str, Any]:
        """Return what is known as plain data, with whole tensors on the CPU."""
        evidence = Evidence(group=_all_ranks() if self.shares_state else None)
        steps = self._steps_everywhere(evidence.group)
        if not steps:
            return {}
        return {
            "criterion": _kind(self.criterion),
            "steps": steps,
            "used": [name for name in steps if name in self._used],
            "totals": {name: self._whole(name, evidence).cpu() for name in steps},
        }

    def _whole(self, name: str, evidence: Evidence) -> Tensor:
        if self._takes_inputs:
            return evidence.sum_over_ranks(self._totals[name])
        return full(self._totals[name], self.parameters[name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, whatever the number of ranks then and now.

        What another kind of criterion has collected is left aside.
        """
        if state.get("criterion") != _kind(self.criterion):
            return
        for name, total in state["totals"].items():
            parameter = self.parameters[name]
            own = total.to(parameter.device, copy=True)
            if self._takes_gradients:
                own = part_of(own, parameter).clone()
            elif _rank() > 0:
                own.zero_()  # the sum of all ranks is on the first
            self._totals[name] = own
        self._steps = dict(state["steps"])
        self._used = set(state["used"])


def dense(gradient: Tensor) -> Tensor:
    """Return the part of ``gradient`` that this rank holds, strided."""
    part = local(gradient)
    return part.to_dense() if part.layout != torch.strided else part


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no element is NaN or infinite."""
    # Twenty times faster than `isfinite` or the largest norm. It is one wait for an accelerator a step.
    sums = [tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
    return not sums or bool(torch.stack([each.to(sums[0]) for each in sums]).isfinite().all())


def _all_ranks() -> dist.ProcessGroup | None:
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    return None if alone else dist.group.WORLD


def _rank() -> int:
    return dist.get_rank() if _all_ranks() is not None else 0


def _kind(criterion: Criterion) -> str:
    return f"{type(criterion).__module__}.{type(criterion).__qualname__}"
