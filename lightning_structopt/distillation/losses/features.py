"""Losses on features, one position at a time: what a hidden layer of the student says of a sample."""

import math

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from typing_extensions import override

from lightning_structopt._checks import require_in, require_type, require_whole
from lightning_structopt._precision import widened
from lightning_structopt.distillation.losses.adapters import (
    adapt_features,
    channel_dim,
    make_adapter,
    resize_like,
)
from lightning_structopt.distillation.losses.logits import DistillationLoss
from lightning_structopt.distillation.outputs import mean_over, require_mask, require_same_shape

_TAP_ELSEWHERE = "Tap layers that fit each other, or use `Hint`, whose adapter fits the channels."
_RESIZE = "Tap layers of the same size, or give `resize=True` to resample the teacher's maps."


class FeatureMSE(DistillationLoss):
    r"""Mean squared difference of features of the same shape, :math:`\frac{1}{n} \sum_i (t_i - s_i)^2`.

    Romero et al., "FitNets: Hints for Thin Deep Nets", 2015 (https://arxiv.org/abs/1412.6550), without a regressor.

    Shapes: student and teacher the same; mask the first one or two of their dimensions, as (N,) or, for tokens
    (N, L, C), (N, L).

    Raises:
        ValueError: Later, if shapes differ.

    Example:
        >>> import torch
        >>> FeatureMSE()(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 3.0))
        tensor(9.)
    """

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        require_same_shape("FeatureMSE", student, teacher, _TAP_ELSEWHERE)

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self.adapt(student, teacher)
        return _mean_of_samples("FeatureMSE", (widened(teacher) - widened(student)).square(), mask)


class Hint(DistillationLoss):
    r"""Mean squared difference after an adapter, :math:`\frac{1}{n} \sum_i (t_i - r(s)_i)^2`.

    The adapter :math:`r` is trained with the student: a 1x1 convolution for maps, a linear layer for tokens and
    vectors, nothing where the channels are the same already. Romero et al., "FitNets: Hints for Thin Deep Nets",
    2015 (https://arxiv.org/abs/1412.6550).

    Shapes: maps (N, C, H, W), tokens (N, L, C) or vectors (N, C), with C of their own; mask (N,) or (N, L).

    Args:
        resize: Whether maps of the teacher that are larger or smaller are resampled to the student's height and
            width; otherwise these must be the same.
        seed: Of the adapter's initial weights, at least 0.

    Raises:
        ValueError: If ``seed`` is negative. Later, if shapes other than the channels differ.
        TypeError: If ``seed`` is not a whole number.

    Example:
        >>> import torch
        >>> hint, student, teacher = Hint(), torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 4, 4)
        >>> hint.adapt(student, teacher)
        >>> hint.adapter
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
        >>> hint(student, teacher) > 0
        tensor(True)
    """

    def __init__(self, resize: bool = False, seed: int = 0) -> None:
        super().__init__()
        require_whole("seed", seed, 0)
        require_type("resize", resize, bool)
        self.resize = resize
        self.seed = seed
        self.adapter: nn.Module = nn.Identity()
        self._channels: tuple[int, int] | None = None

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        self._require_positions(student, teacher)
        dim = channel_dim(student)
        channels = (student.shape[dim], teacher.shape[dim])
        if channels != self._channels:
            same = channels[0] == channels[1]
            self.adapter = nn.Identity() if same else make_adapter(*channels, student, self.seed)
            self._channels = channels

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self._require_positions(student, teacher)
        if self._channels is None:
            self._require_adapted(student, teacher)
        adapted = adapt_features(self.adapter, student)
        teacher = widened(teacher)
        squares = (resize_like(teacher, adapted) - adapted).square()
        return _mean_of_samples("Hint", squares, mask)

    def _require_positions(self, student: Tensor, teacher: Tensor) -> None:
        """Raise where more than the channels differs.

        Raises:
            ValueError: If it does.
        """
        resized = self.resize and student.ndim == teacher.ndim == 4
        if (
            student.ndim != teacher.ndim
            or student.shape[0] != teacher.shape[0]
            or not (resized or _without_channels(student) == _without_channels(teacher))
        ):
            raise ValueError(
                "`Hint` adapts channels, and all else must be the same. Found the student's features of shape "
                f"{tuple(student.shape)} and the teacher's of shape {tuple(teacher.shape)}. {_RESIZE}"
            )

    def _require_adapted(self, student: Tensor, teacher: Tensor) -> None:
        dim = channel_dim(student)
        if student.shape[dim] != teacher.shape[dim]:
            raise RuntimeError(
                f"`Hint` needs an adapter from {student.shape[dim]} to {teacher.shape[dim]} channels. Found none. Call "
                "`adapt(student, teacher)` with example features before the optimizer is made."
            )


class CosineFeature(DistillationLoss):
    r"""Direction of features and not their length, :math:`\frac{1}{P} \sum_p 1 - \cos(t_p, s_p)` over positions.

    Sanh et al., "DistilBERT, a distilled version of BERT", 2019 (https://arxiv.org/abs/1910.01108).

    Shapes: student and teacher the same: maps (N, C, H, W), tokens (N, L, C) or vectors (N, C); mask: that without
    C, or (N,).

    Raises:
        ValueError: Later, if shapes differ.

    Example:
        >>> import torch
        >>> CosineFeature()(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
        tensor(1.)
    """

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        require_same_shape("CosineFeature", student, teacher, _TAP_ELSEWHERE)

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self.adapt(student, teacher)
        distances = 1 - cosine_similarity(widened(student), widened(teacher), dim=channel_dim(student))
        return _mean_of_samples("CosineFeature", distances, mask)


class AttentionTransfer(DistillationLoss):
    r"""Where features are strong, whatever the channels: the mean of :math:`(\hat a^t - \hat a^s)^2`.

    The map :math:`a_p = \sum_c |f_{cp}|^k` over positions is scaled to length 1 for each sample. Zagoruyko and
    Komodakis, "Paying More Attention to Attention", 2017 (https://arxiv.org/abs/1612.03928), as in their code:
    squared differences, and a mean over positions; it is small, so weights of about 1000 are usual.

    Shapes: maps (N, C, H, W) or tokens (N, L, C) with C of their own; mask (N,), or (N, L) for tokens.

    Args:
        power: The exponent :math:`k`, in [1, inf).
        resize: Whether maps of the teacher that are larger or smaller are resampled to the student's height and
            width; otherwise these must be the same.

    Raises:
        ValueError: If ``power`` is out of range. Later, if there are no positions or they differ.

    Example:
        >>> import torch
        >>> features = torch.rand(2, 3, 4, 4)
        >>> AttentionTransfer()(features, -7 * features) < 1e-12  # of the same attention
        tensor(True)
    """

    def __init__(self, power: float = 2.0, resize: bool = False) -> None:
        super().__init__()
        require_in("power", power, 1, math.inf, closed="left")
        self.power = power
        require_type("resize", resize, bool)
        self.resize = resize

    @override
    def adapt(self, student: Tensor, teacher: Tensor) -> None:
        resized = self.resize and student.ndim == teacher.ndim == 4 and len(student) == len(teacher)
        if min(student.ndim, teacher.ndim) < 3 or not (
            resized or _without_channels(student) == _without_channels(teacher)
        ):
            raise ValueError(
                "`AttentionTransfer` compares positions, so it needs maps (N, C, H, W) or tokens (N, L, C) that have "
                f"the same. Found the student's features of shape {tuple(student.shape)} and the teacher's of shape "
                f"{tuple(teacher.shape)}. {_RESIZE}"
            )

    @override
    def forward(
        self, student: Tensor, teacher: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self.adapt(student, teacher)
        student, teacher = widened(student), widened(teacher)
        s, t = self._strength(student), self._strength(resize_like(teacher, student))
        chosen = None
        if mask is not None:
            each_token = mask.ndim > 1 and student.ndim == 3
            chosen = require_mask("AttentionTransfer", mask, s.shape if each_token else s.shape[:1])
            chosen = chosen if each_token else chosen.unsqueeze(1).expand_as(s)
            s, t = s.where(chosen, 0), t.where(chosen, 0)
        return mean_over("AttentionTransfer", (normalize(t) - normalize(s)).square(), chosen)

    def _strength(self, features: Tensor) -> Tensor:
        return features.abs().pow(self.power).mean(channel_dim(features)).flatten(1)


def _without_channels(features: Tensor) -> tuple[int, ...]:
    shape = list(features.shape)
    del shape[channel_dim(features)]
    return tuple(shape)


def _mean_of_samples(owner: str, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of ``values``, where ``mask`` has some of their leading dimensions."""
    if mask is None or mask.ndim >= values.ndim:
        return mean_over(owner, values, mask)
    return mean_over(owner, values.flatten(mask.ndim).mean(-1), mask)
