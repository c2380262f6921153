"""Losses that look at classes one by one: the labelled one apart from the rest, or how they rank."""

import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typing_extensions import override

from lightning_structopt._checks import require_in, require_type
from lightning_structopt.distillation.losses.logits import Tempered
from lightning_structopt.distillation.outputs import mean_over, require_mask, require_same_classes
from lightning_structopt.schedules import Schedule


class DKD(Tempered):
    r"""Soft targets in two parts: how sure the teacher is of the label, and what it thinks of the other classes.

    With :math:`b = (p_y, 1 - p_y)` and :math:`\hat p = (p_c / (1 - p_y))_{c \ne y}`,

    .. math:: T^2 \, \frac{1}{N} \sum_n \alpha \, \mathrm{KL}(b^t_n \| b^s_n)
        + \beta \, \mathrm{KL}(\hat p^t_n \| \hat p^s_n).

    For :math:`\alpha = 1, \beta = 1 - p^t_y` it would be ``SoftTarget``, where a confident teacher hides the second
    part. Zhao et al., "Decoupled Knowledge Distillation", 2022 (https://arxiv.org/abs/2203.08679).

    Shapes: student and teacher (N, C) or (N, C, ...); target and mask (N, ...), of classes below C.

    Args:
        alpha: Weight :math:`\alpha` of the labelled class, in [0, inf).
        beta: Weight :math:`\beta` of the other classes, in [0, inf).
        temperature: The temperature :math:`T`, in (0, inf).
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it.
        ignore_index: Positions with this label don't count, as in ``cross_entropy``.

    Raises:
        ValueError: If an argument is out of range. Later, if classes or shapes differ or there is no label.
        TypeError: If ``schedule`` is not a schedule. Later, if labels are not class indices.

    Example:
        >>> loss = DKD(alpha=1.0, beta=0.0, temperature=1.0)
        >>> loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]))
        tensor(0.1308)
    """

    needs_target: ClassVar[bool] = True

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        schedule: Schedule | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__(temperature, schedule)
        require_in("alpha", alpha, 0, math.inf, closed="left")
        require_in("beta", beta, 0, math.inf, closed="left")
        self.alpha = alpha
        self.beta = beta
        require_type("ignore_index", ignore_index, int)
        self.ignore_index = ignore_index

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        require_same_classes("DKD", student, teacher)
        labels = _require_labels(target, student)
        counts = labels != self.ignore_index
        if mask is not None:
            counts &= require_mask("DKD", mask, labels.shape)
        index = labels.where(counts, 0).unsqueeze(1)
        terms = self._terms(self.log_probabilities(teacher), self.log_probabilities(student), index)
        return self.current_temperature**2 * mean_over("DKD", terms, counts)

    def _terms(self, teacher: Tensor, student: Tensor, index: Tensor) -> Tensor:
        labelled = torch.zeros_like(teacher, dtype=torch.bool).scatter_(1, index, True)
        rest_t = teacher.masked_fill(labelled, -math.inf).logsumexp(
            1, keepdim=True
        )  # not log(1 - p), which is 0
        rest_s = student.masked_fill(labelled, -math.inf).logsumexp(
            1, keepdim=True
        )  # for a student that is sure
        of_label = _divergence(teacher.gather(1, index), student.gather(1, index)) + _divergence(
            rest_t, rest_s
        )
        nothing = torch.finfo(torch.float32).min
        others_t = (teacher - rest_t).masked_fill(labelled, nothing)
        others_s = (student - rest_s).masked_fill(labelled, nothing)
        return self.alpha * of_label.squeeze(1) + self.beta * _divergence(others_t, others_s).sum(1)


class DIST(Tempered):
    r"""How classes rank for each sample, and samples for each class, by Pearson's correlation :math:`\rho`.

    .. math:: T^2 \left(\beta \, \frac{1}{N} \sum_n (1 - \rho(t_{n\cdot}, s_{n\cdot}))
        + \gamma \, \frac{1}{C} \sum_c (1 - \rho(t_{\cdot c}, s_{\cdot c}))\right)

    It asks less of a student than ``SoftTarget`` does where the teacher is much stronger. Samples are compared with
    those of the same batch (under DDP: of the same rank). Huang et al., "Knowledge Distillation from A Stronger
    Teacher", 2022 (https://arxiv.org/abs/2205.10536).

    Shapes: student and teacher (N, C) or (N, C, ...); mask (N, ...).

    Args:
        beta: Weight :math:`\beta` of the classes' relations within samples, in [0, inf).
        gamma: Weight :math:`\gamma` of the samples' relations within classes, in [0, inf).
        temperature: The temperature :math:`T`, in (0, inf).
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it.

    Raises:
        ValueError: If an argument is out of range. Later, if classes or shapes differ.
        TypeError: If ``schedule`` is not a schedule.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> DIST(beta=1.0, gamma=0.0)(logits.flip(1), logits)  # whoever ranks the wrong way round
        tensor(1.8671)
    """

    def __init__(
        self,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(temperature, schedule)
        require_in("beta", beta, 0, math.inf, closed="left")
        require_in("gamma", gamma, 0, math.inf, closed="left")
        self.beta = beta
        self.gamma = gamma

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        require_same_classes("DIST", student, teacher)
        s, t = (self.log_probabilities(logits).exp().movedim(1, -1) for logits in (student, teacher))
        chosen = ... if mask is None else require_mask("DIST", mask, s.shape[:-1])
        s, t = s[chosen].flatten(0, -2), t[chosen].flatten(0, -2)
        loss = s.sum() * 0  # where nothing is left to compare
        if len(s) > 0:
            loss = loss + self.beta * (1 - _correlation(s, t)).mean()
        if len(s) > 1:  # one sample has no relation to others
            loss = loss + self.gamma * (1 - _correlation(s.T, t.T)).mean()
        return self.current_temperature**2 * loss


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    return teacher.exp() * (teacher - student)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of ``one`` with that of ``other``; 0 where one is constant."""
    return cosine_similarity(
        one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True), dim=1, eps=1e-8
    )


def _require_labels(target: Tensor | None, student: Tensor) -> Tensor:
    if target is None:
        raise ValueError(
            "`DKD` needs the labels. Found no `target`. Give `DistillationModule` a `target` that takes them from the "
            "batch, or use `SoftTarget`."
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(
            f"`DKD` needs labels that are class indices. Found labels of type {target.dtype}. Mixed labels have no "
            "single class: use `SoftTarget` with them."
        )
    if target.shape != student.shape[:1] + student.shape[2:]:
        raise ValueError(
            f"`DKD` needs a label for each prediction. Found labels of shape {tuple(target.shape)} for logits of shape "
            f"{tuple(student.shape)}. Give class indices without the dimension of classes."
        )
    return target.long()
