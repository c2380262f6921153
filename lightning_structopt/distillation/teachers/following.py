"""A teacher that is an average of the student's own past."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typing_extensions import Self, override

from lightning_structopt._checks import require_in
from lightning_structopt.distillation.taps import Taps
from lightning_structopt.distillation.teachers.frozen import FrozenTeacher, Precision


@dataclass(frozen=True)
class EMATeacher:
    r"""Self-distillation: the teacher is an average of the student, :math:`t \gets d \, t + (1 - d) \, s` a step.

    It starts as a copy of the student when training starts, and is saved in checkpoints. Tarvainen and Valpola, "Mean
    teachers are better role models", 2017 (https://arxiv.org/abs/1703.01780).

    Args:
        decay: How much of the average a step keeps, :math:`d` in [0, 1).

    Raises:
        ValueError: If ``decay`` is out of range.

    Example:
        >>> EMATeacher(decay=0.99)
        EMATeacher(decay=0.99)
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        require_in("decay", self.decay, 0, 1, closed="left")


class FollowingTeacher(FrozenTeacher):
    """The teacher that :class:`EMATeacher` stands for.

    Args:
        student: Whom to follow.
        places: What to return: names of its modules, or "logits".
        read: From a batch to the input.
        average: How slowly to follow.
        precision: What autocast computes in; None for what the trainer's precision says.
    """

    def __init__(
        self,
        student: nn.Module,
        places: Iterable[str],
        read: Callable[[Any], Any],
        average: EMATeacher,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(student, places, read, precision)
        self.average = average
        self._student = student
        self._steps = 0

    @override
    def attach(self) -> None:
        if (
            self._steps == 0
        ):  # not earlier: by now the student has all its parts, and weights that were loaded
            self._become(self._student)
        super().attach()

    @override
    @torch.no_grad()
    def follow(self) -> None:
        self._steps += 1
        mine: list[Tensor] = list(self.module.parameters())
        theirs: list[Tensor] = list(self._student.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - self.average.decay)
        for buffer, new in zip(self.module.buffers(), self._student.buffers(), strict=True):
            buffer.copy_(new)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "weights": self.module.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        self.module.load_state_dict(state["weights"])

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Unlike a frozen teacher, it belongs to one student: a copy follows that student's copy.
        twin = copy.copy(self)
        vars(twin).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return twin

    def _become(self, student: nn.Module) -> None:
        if any(isinstance(parameter, DTensor) for parameter in student.parameters()):
            raise ValueError(
                "`EMATeacher` holds a copy of the student. Found a student in shards (FSDP2), which can't be copied. "
                "Use `ddp`."
            )
        self.module = copy.deepcopy(student).eval()
        self.taps = Taps(self.module, self.taps.names, "teacher")
