"""Losses on logits: how far the student's outputs are from the teacher's."""

import inspect
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_type
from lightning_structopt._precision import widened
from lightning_structopt.distillation.outputs import (
    mean_over,
    require_same_classes,
    require_same_shape,
)
from lightning_structopt.schedules import Schedule

_END = 1e9  # steps: past any warmup


class DistillationLoss(nn.Module, ABC):
    """How far a student's output is from its teacher's, a scalar.

    Write your own by keeping three rules. The value is a mean over samples, so that it doesn't grow with the
    batch. It is computed in float32 or better, whatever comes in. Arguments are kept under their own names, which
    ``repr`` prints.

    Example:
        >>> class Gap(DistillationLoss):
        ...     def forward(self, student, teacher, target=None, mask=None):
        ...         return (student - teacher).abs().mean()
        >>> Gap()(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(1.)
    """

    needs_target: ClassVar[bool] = False
    """Whether ``forward`` needs the labels."""

    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        """Build what depends on shapes, and refuse shapes that don't fit; called before optimizers are made.

        Called again with the same shapes, it keeps what is there.

        Args:
            student: An example of the student's output.
            teacher: An example of the teacher's output.
        """
        return

    def advance(self, t: float, horizon: float) -> None:
        """Set what follows a schedule; called before each training step.

        Args:
            t: Steps done so far, at least 0.
            horizon: Steps until training ends; ``math.inf`` where nothing bounds it.
        """
        return

    @override
    @abstractmethod
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            student: The student's output.
            teacher: The teacher's output.
            target: The labels, for losses that need them.
            mask: Which positions count, True for those that do; None for all of them.
        """

    @override
    def __repr__(self) -> str:
        arguments = inspect.signature(type(self)).parameters.values()
        names = [a.name for a in arguments if a.kind not in {a.VAR_POSITIONAL, a.VAR_KEYWORD}]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


class Tempered(DistillationLoss):
    r"""Base of losses on class probabilities that a temperature softens, :math:`p = \mathrm{softmax}(z / T)`.

    Args:
        temperature: The temperature :math:`T`, in (0, inf). Above 1 it brings out what the teacher thinks of the
            classes that it doesn't choose.
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it. It must not end at
            zero.

    Raises:
        ValueError: If ``temperature`` is not positive and finite, or its schedule ends at zero.
        TypeError: If ``schedule`` is not a schedule.
    """

    class_dim: ClassVar[int] = 1

    def __init__(self, temperature: float = 4.0, schedule: Schedule | None = None) -> None:
        super().__init__()
        require_in("temperature", temperature, 0, math.inf, closed="neither")
        if schedule is not None:
            require_type("schedule", schedule, Schedule)
        self.temperature = temperature
        self.schedule = schedule
        self._factor = 1.0
        if schedule is not None:
            if schedule.needs_horizon:  # then its end doesn't depend on how long training is
                self._factor_at(_END, _END)
            self._factor = self._factor_at(0, math.inf)

    @property
    def current_temperature(self) -> float:
        """The temperature as of the last call of :meth:`advance`."""
        return self.temperature * self._factor

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        require_same_classes(type(self).__name__, student, teacher, self.class_dim)

    @override
    def advance(self, t: float, horizon: float) -> None:
        if self.schedule is not None:
            self._factor = self._factor_at(t, horizon)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Return the softened logarithms, finite also for classes that logits of minus infinity rule out."""
        scores = widened(logits) / self.current_temperature
        return scores.log_softmax(self.class_dim).clamp_min(torch.finfo(torch.float32).min)

    def _factor_at(self, t: float, horizon: float) -> float:
        assert self.schedule is not None
        factor = self.schedule(t, horizon)
        if not 0 < factor < math.inf:
            raise ValueError(
                f"The temperature must stay positive. Found that `{self.schedule!r}` multiplies it by {factor}. Use a "
                "schedule that stays above zero, such as `Linear(end=0.25)`."
            )
        return factor


class Divergence(Tempered):
    r"""Base of losses that are a divergence of class probabilities, :math:`T^2 \, \frac{1}{N} \sum_n D(t_n, s_n)`.

    The factor :math:`T^2` keeps gradients at one scale whatever the temperature. Each pixel or position of outputs
    of more than two dimensions counts as a sample.
    """

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        require_same_classes(type(self).__name__, student, teacher, self.class_dim)
        terms = self.terms(self.log_probabilities(teacher), self.log_probabilities(student))
        divergences = terms.sum(self.class_dim)
        return self.current_temperature**2 * mean_over(type(self).__name__, divergences, mask)

    @abstractmethod
    def terms(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the terms of the divergence, to be summed over classes, from logarithms of probabilities."""


class SoftTarget(Divergence):
    r"""The teacher's softened probabilities as targets, :math:`T^2 \, \frac{1}{N} \sum_n \mathrm{KL}(t_n \| s_n)`.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015 (https://arxiv.org/abs/1503.02531).

    Shapes: student and teacher (N, C) or (N, C, ...); mask (N, ...).

    Args:
        temperature: The temperature :math:`T`, in (0, inf).
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it.

    Raises:
        ValueError: If ``temperature`` is not positive and finite, or its schedule ends at zero. Later, if classes
            or shapes differ.
        TypeError: If ``schedule`` is not a schedule.

    Example:
        >>> loss = SoftTarget(temperature=2.0)
        >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]]))  # (3/4, 1/4) against (1/2, 1/2)
        tensor(0.5232)
    """

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> Tensor:
        return teacher.exp() * (teacher - student)


class ReverseKL(Divergence):
    r"""The divergence seen from the student, :math:`T^2 \, \frac{1}{N} \sum_n \mathrm{KL}(s_n \| t_n)`.

    It punishes what the student believes and the teacher doesn't, so that a small student settles for some of the
    teacher's modes. Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2024
    (https://arxiv.org/abs/2306.08543).

    Shapes: student and teacher (N, C) or (N, C, ...); mask (N, ...).

    Args:
        temperature: The temperature :math:`T`, in (0, inf).
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it.

    Raises:
        ValueError: If ``temperature`` is not positive and finite, or its schedule ends at zero. Later, if classes
            or shapes differ.
        TypeError: If ``schedule`` is not a schedule.

    Example:
        >>> loss = ReverseKL(temperature=1.0)
        >>> loss(torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.1308)
    """

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> Tensor:
        return student.exp() * (student - teacher)


class JensenShannon(Divergence):
    r"""Both to their mixture :math:`m = \beta t + (1 - \beta) s`.

    .. math:: T^2 \, \frac{1}{N} \sum_n \beta \, \mathrm{KL}(t_n \| m_n) + (1 - \beta) \, \mathrm{KL}(s_n \| m_n)

    It is bounded, and divided by :math:`\beta` or :math:`1 - \beta` it tends to ``SoftTarget`` for small and to
    ``ReverseKL`` for large :math:`\beta`. Agarwal et al., "On-Policy Distillation of Language Models: Learning from
    Self-Generated Mistakes", 2024 (https://arxiv.org/abs/2306.13649).

    Shapes: student and teacher (N, C) or (N, C, ...); mask (N, ...).

    Args:
        beta: The teacher's share :math:`\beta` of the mixture, in (0, 1).
        temperature: The temperature :math:`T`, in (0, inf).
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it.

    Raises:
        ValueError: If ``beta`` or ``temperature`` is out of range, or its schedule ends at zero. Later, if classes
            or shapes differ.
        TypeError: If ``schedule`` is not a schedule.

    Example:
        >>> loss = JensenShannon(temperature=1.0)
        >>> loss(torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]]))  # at most log 2
        tensor(0.6931)
    """

    def __init__(self, beta: float = 0.5, temperature: float = 4.0, schedule: Schedule | None = None) -> None:
        super().__init__(temperature, schedule)
        require_in("beta", beta, 0, 1, closed="neither")
        self.beta = beta

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> Tensor:
        mixture = torch.logaddexp(teacher + math.log(self.beta), student + math.log1p(-self.beta))
        mine = self.beta * teacher.exp() * (teacher - mixture)
        return mine + (1 - self.beta) * student.exp() * (student - mixture)


class LogitMSE(DistillationLoss):
    r"""Squared distance of outputs, :math:`\frac{1}{N} \sum_n \sum_c (t_{nc} - s_{nc})^2`; also for regression.

    Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2014 (https://arxiv.org/abs/1312.6184).

    Shapes: student and teacher (N,), (N, C) or (N, C, ...); mask (N,) or (N, ...), without C.

    Raises:
        ValueError: Later, if classes or shapes differ.

    Example:
        >>> LogitMSE()(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(3.)
    """

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        if student.ndim > 1 and teacher.ndim > 1 and student.shape[1] != teacher.shape[1]:
            require_same_classes("LogitMSE", student, teacher)
        require_same_shape("LogitMSE", student, teacher, "Let one of the two return its output reshaped.")

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self.adapt(student, teacher)
        squares = (widened(teacher) - widened(student)).square()
        return mean_over("LogitMSE", squares.sum(1) if squares.ndim > 1 else squares, mask)
