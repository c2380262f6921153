"""All that is compared in a training step: pairs of outputs, their losses, and the adapters in these."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt.distillation.batches import default_target
from lightning_structopt.distillation.pairs import Pair
from lightning_structopt.distillation.taps import LOGITS
from lightning_structopt.schedules import Schedule

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class Comparison:
    """The losses on pairs of outputs.

    Losses stay out of the student's tree, so that its keys, its summary, its averages and what is pruned of it are
    the student's alone.

    Args:
        pairs: What is compared.
        target: From a batch to its labels; None for its second part, where a loss needs them.
        mask: From a batch to which positions count; None for all.
    """

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        target: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.pairs = pairs
        self.losses = nn.ModuleList(pair.loss for pair in pairs)
        self._target = target
        self._mask = mask
        self._shapes: list[Shapes] = []

    @property
    def adapters(self) -> list[nn.Parameter]:
        """What trains with the student."""
        return [parameter for parameter in self.losses.parameters() if parameter.requires_grad]

    @property
    def schedules(self) -> list[Schedule]:
        """The schedules that losses follow."""
        found = [getattr(loss, "schedule", None) for loss in self.losses]
        return [schedule for schedule in found if isinstance(schedule, Schedule)]

    def advance(self, t: float, horizon: float) -> None:
        """Set what follows a schedule."""
        for pair in self.pairs:
            pair.loss.advance(t, horizon)

    def adapt(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[nn.Parameter]:
        """Let losses build what depends on shapes; return the parameters that are new.

        Args:
            student: The student's outputs by place.
            teacher: The teacher's, likewise.

        Raises:
            ValueError: If shapes don't fit a loss.
        """
        before = {id(parameter) for parameter in self.losses.parameters()}
        examples = [(student[pair.student].detach(), teacher[pair.teacher]) for pair in self.pairs]
        self._adapt(examples)
        self._shapes = [(tuple(s.shape), tuple(t.shape)) for s, t in examples]
        return [parameter for parameter in self.adapters if id(parameter) not in before]

    def _adapt(self, examples: list[tuple[Tensor, Tensor]]) -> None:
        for pair, (student, teacher) in zip(self.pairs, examples, strict=True):
            pair.loss.adapt(student, teacher)
            pair.loss.to(student.device)

    def values(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Any
    ) -> dict[str, Tensor]:
        """Return each pair's loss by its title, before weights.

        Args:
            student: The student's outputs by place.
            teacher: The teacher's, likewise.
            batch: The batch that they are of.
        """
        mask = None if self._mask is None else self._mask(batch)
        return {
            pair.title: pair.loss(
                student[pair.student], teacher[pair.teacher], self._target_for(pair, batch), mask
            )
            for pair in self.pairs
        }

    def total(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of what :meth:`values` returned."""
        first, *others = (
            values[pair.title] if pair.weight == 1 else pair.weight * values[pair.title]
            for pair in self.pairs
        )
        return sum(others, start=first)

    def agreement(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], batch: Any
    ) -> Tensor | None:
        """Return how often both rate the same class highest, or None where no pair compares logits of classes.

        Args:
            student: The student's outputs by place.
            teacher: The teacher's, likewise.
            batch: The batch that they are of.
        """
        for pair in self.pairs:
            ours, theirs = student[pair.student].detach(), teacher[pair.teacher]
            dim = getattr(pair.loss, "class_dim", 1)
            if LOGITS in {pair.student, pair.teacher} and ours.shape == theirs.shape and ours.ndim > 1:
                same = (ours.argmax(dim) == theirs.argmax(dim)).float()
                return same.mean() if self._mask is None else _mean_where(same, self._mask(batch))
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what trained losses have learned, as plain data; empty where there is nothing."""
        state = self.losses.state_dict()
        return {"shapes": self._shapes, "losses": state} if state else {}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state_dict` returned, building adapters of the shapes that they had.

        Args:
            state: The state, of the same pairs.
            device: Where the losses are to be.

        Raises:
            ValueError: If it is of other pairs.
        """
        if state and len(state["shapes"]) != len(self.pairs):
            raise ValueError(
                f"A checkpoint goes on with its own losses. Found {len(state['shapes'])} in it and {len(self.pairs)} "
                "in `loss`. Give the same `loss`, or start from the weights alone."
            )
        if state:
            # Expanded: of the shape, and of no size in memory.
            zero = torch.zeros((), device=device)
            self._adapt([(zero.expand(tuple(s)), zero.expand(tuple(t))) for s, t in state["shapes"]])
            self._shapes = list(state["shapes"])
            self.losses.load_state_dict(state["losses"])

    def _target_for(self, pair: Pair, batch: Any) -> Tensor | None:
        if self._target is not None:
            return self._target(batch)
        target: Tensor | None = default_target(batch) if pair.loss.needs_target else None
        return target


def enroll(adapters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer]) -> None:
    """Let the first of ``optimizers`` train ``adapters`` too, with the rate of its fastest group.

    They join a group that is there: schedulers count groups, and break over one that is added.

    Raises:
        ValueError: If there is no optimizer.
    """
    if not adapters:
        return
    groups = [group for optimizer in optimizers[:1] for group in optimizer.param_groups]
    if not groups:
        raise ValueError(
            "Adapters are trained by the student's optimizer. Found none. Return one from `configure_optimizers`, or "
            "use losses without adapters."
        )
    enrolled = {
        id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    group = max(groups, key=lambda g: float(g.get("initial_lr", g.get("lr", 0.0))))
    for index, adapter in enumerate(adapters):
        if id(adapter) not in enrolled:
            group["params"].append(adapter)
            if "param_names" in group:
                group["param_names"].append(f"distillation.{index}")


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    counts = mask.to(values.dtype)
    return (values * counts).sum() / counts.sum().clamp_min(1)
