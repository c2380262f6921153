"""Losses on how samples of a batch lie to each other, so that features need not have the same shape."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss
from typing_extensions import override

from lightning_structopt._checks import require_in
from lightning_structopt._precision import widened
from lightning_structopt.distillation.losses.logits import DistillationLoss
from lightning_structopt.distillation.outputs import require_mask


class RKD(DistillationLoss):
    r"""Relational knowledge distillation: distances and angles between samples.

    .. math:: \lambda_d \, \ell(\psi^t_d, \psi^s_d) + \lambda_a \, \ell(\psi^t_a, \psi^s_a)

    Here :math:`\ell` is the mean of Huber's loss, :math:`\psi_d(i, j) = \lVert f_i - f_j \rVert / \mu` with the mean
    distance :math:`\mu` of the batch, and :math:`\psi_a(i, j, k) = \cos \angle f_j f_i f_k`. Neither changes where all
    features are moved, rotated or scaled. Samples are compared with those of the same batch (under DDP: of the same
    rank); angles take memory that grows with the cube of the batch. Park et al., "Relational Knowledge
    Distillation", 2019 (https://arxiv.org/abs/1904.05068).

    Shapes: student and teacher (N, ...), each with its own; mask (N,).

    Args:
        distance: Weight :math:`\lambda_d`, in [0, inf).
        angle: Weight :math:`\lambda_a`, in [0, inf).

    Raises:
        ValueError: If a weight is out of range, or both are zero. Later, if batch sizes differ.

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> student = teacher.roll(1, 1) * 2 + 1
        >>> RKD()(student, teacher) < 1e-9
        tensor(True)
    """

    def __init__(self, distance: float = 25.0, angle: float = 50.0) -> None:
        super().__init__()
        require_in("distance", distance, 0, math.inf, closed="left")
        require_in("angle", angle, 0, math.inf, closed="left")
        if distance == 0 and angle == 0:
            raise ValueError(
                "`distance` or `angle` must be positive. Found zero for both. Give one of them weight."
            )
        self.distance = distance
        self.angle = angle

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
            raise ValueError(
                "`RKD` needs features of the same samples, of shape (N, ...). Found the student's of shape "
                f"{tuple(student.shape)} and the teacher's of shape {tuple(teacher.shape)}. Tap layers whose first "
                "dimension is the batch."
            )

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self.adapt(student, teacher)
        s, t = widened(student).flatten(1), widened(teacher).flatten(1)
        if mask is not None:
            chosen = require_mask("RKD", mask, student.shape[:1])
            s, t = s[chosen], t[chosen]
        loss = s.sum() * 0
        if len(s) < 2:  # nothing to compare with
            return loss
        with torch.autocast(s.device.type, enabled=False):
            if self.distance:
                loss = loss + self.distance * smooth_l1_loss(_distances(s), _distances(t))
            if self.angle:
                loss = loss + self.angle * smooth_l1_loss(_angles(s), _angles(t))
        return loss


def _distances(features: Tensor) -> Tensor:
    """Return all distances (N, N) in units of their mean."""
    # Not by way of inner products, which round the distances of near samples away.
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (distances > 0).sum().clamp_min(1)
    return distances / mean.clamp_min(torch.finfo(mean.dtype).tiny)


def _angles(features: Tensor) -> Tensor:
    """Return the cosines (N, N, N) of the angles at each sample between any two others."""
    directions = normalize(features.unsqueeze(0) - features.unsqueeze(1), dim=2)
    return directions @ directions.transpose(1, 2)
