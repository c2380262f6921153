"""What goes on beside the student's own training: taps, teacher, losses, and when each of them is ready."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_structopt._horizon import steps_taken, training_horizon
from lightning_structopt.distillation.balance import Balance, require_horizon
from lightning_structopt.distillation.comparison import Comparison, enroll
from lightning_structopt.distillation.means import Means
from lightning_structopt.distillation.ranks import (
    average_gradients,
    require_whole_adapters,
    same_on_all_ranks,
)
from lightning_structopt.distillation.taps import Taps
from lightning_structopt.distillation.teachers.frozen import FrozenTeacher

Outputs: TypeAlias = dict[str, Tensor]


class Distiller:
    """The parts of distillation and their state in a fit.

    Args:
        teacher: Whom to ask.
        taps: What catches the student's outputs.
        comparison: The losses between the two.
        balance: How much task and teacher count.
    """

    def __init__(self, teacher: FrozenTeacher, taps: Taps, comparison: Comparison, balance: Balance) -> None:
        self.teacher = teacher
        self.taps = taps
        self.comparison = comparison
        self.balance = balance
        self.factors = balance.factors(0, math.inf)
        self.means = Means()
        self._scheduled = bool(self._schedules)
        self._horizon = math.inf
        self._adapted = False
        self._restored: dict[str, Any] | None = None
        self._attached = False

    def attach(self, trainer: Any) -> None:
        """Get ready for a fit of ``trainer``, whose optimizers are made and not yet restored.

        Raises:
            ValueError: If a tap names nothing, or adapters of an earlier fit can't be trained in this one.
        """
        device = trainer.strategy.root_device
        self.teacher.attach()  # before taps: it may be a copy of the student
        self.taps.attach()
        self.comparison.losses.to(device).train()
        self._attached, self._adapted = True, False
        self.means.take()
        if self._restored is not None:
            self.load_state_dict(self._restored, device)
        self._enroll(trainer)

    def start(self, trainer: Any) -> None:
        """Learn how long training will be.

        Raises:
            ValueError: If a schedule needs an end and there is none.
        """
        self._horizon = training_horizon(trainer).steps
        require_horizon(self._schedules, self._horizon)

    def advance(self, trainer: Any) -> None:
        """Set what follows a schedule for the step that comes."""
        if self._scheduled and trainer is not None:
            t = steps_taken(trainer)
            self.factors = self.balance.factors(t, self._horizon)
            self.comparison.advance(t, self._horizon)

    def adapt(self, student: Outputs, teacher: Outputs, trainer: Any) -> None:
        """Let losses see the first outputs of a fit, and the optimizer train what they make of them.

        Raises:
            ValueError: If outputs don't fit a loss.
        """
        if self._adapted:
            return
        if self.comparison.adapt(student, teacher):
            same_on_all_ranks(trainer, self.comparison.losses)
            self._enroll(trainer)
        self._adapted = True

    def average_gradients(self, trainer: Any) -> None:
        """Average the gradients of adapters over ranks."""
        if adapters := self.comparison.adapters:
            average_gradients(trainer, adapters)

    def total(self, task: Tensor, distillation: Tensor) -> Tensor:
        """Return both, by their factors of this step."""
        of_task, of_teacher = self.factors
        return of_task * task + of_teacher * distillation

    def detach(self) -> None:
        """Take all hooks away."""
        self.taps.remove()
        self.teacher.detach()
        self._attached = False

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the student, as plain data."""
        parts = {"comparison": self.comparison.state_dict(), "teacher": self.teacher.state_dict()}
        return {name: state for name, state in parts.items() if state}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state_dict` returned; before :meth:`attach`, wait for it.

        Raises:
            ValueError: If it is of other losses.
        """
        if not self._attached:
            self._restored = dict(state)
            return
        self.comparison.load_state_dict(state.get("comparison", {}), device)
        if "teacher" in state:
            self.teacher.load_state_dict(state["teacher"])
        self._restored = None

    @property
    def _schedules(self) -> list[Any]:
        own = [] if self.balance.schedule is None else [self.balance.schedule]
        return [*own, *self.comparison.schedules]

    def _enroll(self, trainer: Any) -> None:
        if trainer is not None:
            adapters = self.comparison.adapters
            require_whole_adapters(trainer, adapters)
            enroll(adapters, trainer.optimizers)
