"""A loss that lets the student tell which of many samples a feature of the teacher belongs to."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from typing_extensions import override

from lightning_structopt._checks import require_in, require_whole
from lightning_structopt._precision import widened
from lightning_structopt.distillation.losses.adapters import adapt_features, make_adapter
from lightning_structopt.distillation.losses.logits import DistillationLoss
from lightning_structopt.distillation.outputs import require_mask


class ContrastiveRepresentation(DistillationLoss):
    r"""Contrastive representation distillation (CRD): each sample's own teacher feature against those of others.

    .. math:: -\frac{1}{N} \sum_i \log \frac{\exp(u_i^\top v_i / \tau)}{\exp(u_i^\top v_i / \tau)
        + \sum_{j \in \mathrm{neg}(i)} \exp(u_i^\top v_j / \tau)}

    with :math:`u` and :math:`v` the student's and the teacher's features after trained linear heads, of length 1.
    Negatives are the other samples of the batch and, with ``queue``, the latest of earlier batches; given labels,
    only those of other classes. The paper keeps an embedding of every sample of the data set instead. That takes
    memory and sample numbers, and its embeddings are an epoch old. The queue holds the teacher's features from before
    the head, which never get old; it belongs to the state dict, so that training resumes with it. Under DDP each rank
    has a queue of its own, of which a checkpoint holds the first rank's. Tian et al., "Contrastive Representation
    Distillation", 2020 (https://arxiv.org/abs/1910.10699).

    Shapes: student and teacher vectors (N, C), or maps (N, C, H, W) and tokens (N, L, C), of which the mean over
    positions is taken, each with C of its own; target and mask (N,).

    Args:
        dim: Width of the heads' outputs, at least 1.
        temperature: The temperature :math:`\tau`, in (0, inf).
        queue: How many samples of earlier batches are negatives too, at least 0. Let it be well below the size of
            the data set, so that a sample doesn't meet itself.
        seed: Of the heads' initial weights, at least 0.

    Raises:
        ValueError: If an argument is out of range. Later, if batch sizes differ.
        TypeError: If ``dim``, ``queue`` or ``seed`` is not a whole number.

    Example:
        >>> loss, features = ContrastiveRepresentation(dim=8), torch.eye(4)
        >>> loss.adapt(features, features)
        >>> loss(features, features).shape
        torch.Size([])
    """

    queue_features: Tensor
    queue_labels: Tensor
    queue_count: Tensor

    def __init__(self, dim: int = 128, temperature: float = 0.07, queue: int = 0, seed: int = 0) -> None:
        super().__init__()
        require_whole("dim", dim, 1)
        require_in("temperature", temperature, 0, math.inf, closed="neither")
        require_whole("queue", queue, 0)
        require_whole("seed", seed, 0)
        self.dim = dim
        self.temperature = temperature
        self.queue = queue
        self.seed = seed
        self._channels: tuple[int, int] | None = None

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        s, t = _pooled(student), _pooled(teacher)
        channels = (s.shape[1], t.shape[1])
        if channels == self._channels:
            return
        self.student_head = make_adapter(channels[0], self.dim, s, self.seed)
        self.teacher_head = make_adapter(channels[1], self.dim, t, self.seed + 1)
        self.register_buffer("queue_features", torch.zeros(self.queue, channels[1], device=t.device))
        self.register_buffer("queue_labels", torch.full((self.queue,), -1, device=t.device))
        self.register_buffer("queue_count", torch.zeros((), dtype=torch.long, device=t.device))
        self._channels = channels

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        s, t = self._require_features(student, teacher)
        labels = torch.full((len(s),), -1, device=s.device) if target is None else _require_labels(target, s)
        if mask is not None:
            chosen = require_mask("ContrastiveRepresentation", mask, s.shape[:1])
            s, t, labels = s[chosen], t[chosen], labels[chosen]
        if len(s) == 0:
            return s.sum() * 0
        candidates = torch.cat([
            t,
            self.queue_features,
        ])  # a copy: the queue changes before backward
        u = normalize(adapt_features(self.student_head, s))
        v = normalize(adapt_features(self.teacher_head, candidates))
        with torch.autocast(s.device.type, enabled=False):
            scores = u @ v.T / self.temperature
        allowed = self._negatives(labels)
        loss = cross_entropy(scores.masked_fill(~allowed, -math.inf), torch.arange(len(s), device=s.device))
        if self.training and self.queue:
            self._remember(t, labels)
        return loss

    def _negatives(self, labels: Tensor) -> Tensor:
        """Return which candidates (N, N + queue) each sample is compared with, itself included."""
        theirs = torch.cat([labels, self.queue_labels])
        same_class = (labels.unsqueeze(1) == theirs) & (labels.unsqueeze(1) >= 0)
        filled = torch.arange(self.queue, device=labels.device) < self.queue_count
        there = torch.cat([torch.ones_like(labels, dtype=torch.bool), filled])
        itself = torch.eye(len(labels), len(theirs), dtype=torch.bool, device=labels.device)
        return (there & ~same_class) | itself

    @torch.no_grad()
    def _remember(self, teacher: Tensor, labels: Tensor) -> None:
        teacher, labels = teacher[-self.queue :], labels[-self.queue :]
        # Places are counted on the device, so that nothing waits for it.
        places = (self.queue_count + torch.arange(len(labels), device=labels.device)) % self.queue
        self.queue_features.index_copy_(0, places, teacher.to(self.queue_features.dtype))
        self.queue_labels.index_copy_(0, places, labels)
        self.queue_count += len(labels)

    def _require_features(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        s, t = _pooled(student), _pooled(teacher)
        if len(s) != len(t):
            raise ValueError(
                "`ContrastiveRepresentation` needs features of the same samples. Found the student's of shape "
                f"{tuple(student.shape)} and the teacher's of shape {tuple(teacher.shape)}. Tap layers whose first "
                "dimension is the batch."
            )
        if self._channels != (s.shape[1], t.shape[1]):
            made = f"heads for {self._channels}" if self._channels else "no heads"
            raise RuntimeError(
                f"`ContrastiveRepresentation` needs heads for {s.shape[1]} and {t.shape[1]} channels. Found {made}. "
                "Call `adapt(student, teacher)` with example features before the optimizer is made."
            )
        return s, t


def _pooled(features: Tensor) -> Tensor:
    """Return one vector a sample, (N, C).

    Raises:
        ValueError: If there are no channels.
    """
    if features.ndim < 2:
        raise ValueError(
            "`ContrastiveRepresentation` needs features of shape (N, C), (N, L, C) or (N, C, H, W). Found shape "
            f"{tuple(features.shape)}. Tap another layer."
        )
    if features.ndim > 3:
        return widened(features).flatten(2).mean(2)
    return widened(features).mean(1) if features.ndim == 3 else widened(features)


def _require_labels(target: Tensor, features: Tensor) -> Tensor:
    if target.is_floating_point() or target.shape != features.shape[:1]:
        raise ValueError(
            f"`ContrastiveRepresentation` needs one class index a sample as `target`, of shape ({len(features)},). "
            f"Found {target.dtype} of shape {tuple(target.shape)}. Give no `target` to contrast samples alone."
        )
    return target.long()
