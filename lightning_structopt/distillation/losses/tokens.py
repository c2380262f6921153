"""Losses of sequence models, on logits over a vocabulary."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt.distillation.losses.logits import SoftTarget
from lightning_structopt.schedules import Schedule


class TokenKL(SoftTarget):
    r"""Soft targets for each token, :math:`T^2` times the mean of :math:`\mathrm{KL}(t \| s)` over tokens that count.

    With ``top_k``, the teacher's :math:`k` likeliest tokens count one by one and all others as one: with the sums
    :math:`t_r, s_r` of their probabilities,

    .. math:: \sum_{v \in \mathrm{top}_k} t_v \log \frac{t_v}{s_v} + t_r \log \frac{t_r}{s_r},

    which is never more than the whole divergence, and zero only where the student agrees on each of the ``k`` and on
    what is left. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015
    (https://arxiv.org/abs/1503.02531), token by token as in Kim and Rush, "Sequence-Level Knowledge Distillation",
    2016 (https://arxiv.org/abs/1606.07947).

    Shapes: student and teacher (N, L, V); mask (N, L), True or 1 for tokens that count and not for padding.

    Args:
        temperature: The temperature :math:`T`, in (0, inf).
        top_k: How many of the teacher's tokens count one by one, at least 1; None for all.
        schedule: What ``temperature`` is multiplied by as training goes on; None keeps it.

    Raises:
        ValueError: If ``temperature`` is not positive and finite, its schedule ends at zero, or ``top_k`` is smaller
            than 1. Later, if vocabularies or shapes differ, or ``top_k`` is larger than the vocabulary.
        TypeError: If ``top_k`` is not a whole number or ``schedule`` not a schedule.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 4), torch.tensor([[[9.0, 0, 0, 0], [0, 0, 0, 0]]])
        >>> TokenKL(temperature=1.0)(student, teacher, mask=torch.tensor([[False, True]]))
        tensor(0.)
    """

    class_dim: ClassVar[int] = -1

    def __init__(
        self, temperature: float = 1.0, top_k: int | None = None, schedule: Schedule | None = None
    ) -> None:
        super().__init__(temperature, schedule)
        if top_k is not None:
            require_whole("top_k", top_k, 1)
        self.top_k = top_k

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        super().adapt(student, teacher)
        self._require_tokens(teacher.shape[-1])

    @override
    def terms(self, teacher: Tensor, student: Tensor) -> Tensor:
        self._require_tokens(teacher.shape[-1])
        if self.top_k is not None and self.top_k < teacher.shape[-1]:
            top, index = teacher.topk(self.top_k, dim=-1)
            teacher = torch.cat([top, _rest(teacher, index)], -1)
            student = torch.cat([student.gather(-1, index), _rest(student, index)], -1)
        return super().terms(teacher, student)

    def _require_tokens(self, tokens: int) -> None:
        if self.top_k is not None and self.top_k > tokens:
            raise ValueError(
                f"`top_k` must not be larger than the vocabulary. Found `top_k = {self.top_k}` and {tokens} tokens. "
                "Give a smaller `top_k`, or None for all tokens."
            )


def _rest(logarithms: Tensor, index: Tensor) -> Tensor:
    """Return the logarithm of what the tokens other than those at ``index`` have together."""
    # Summing them is exact where 1 minus the sum of the others would be rounding noise.
    return logarithms.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
