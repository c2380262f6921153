"""Penalties on weights: value, subgradient, proximal map, and the step size that the map goes with."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in
from lightning_structopt._precision import widened

Step = float | Tensor


class Penalty(ABC):
    r"""A cost of large weights, :math:`\lambda \phi(w)`.

    Write your own by keeping two rules. Zero stays zero: there the subgradient is zero, and so is the proximal
    map. Strength and step only enter the map as their product, as a schedule acts on the step. Weights may be
    DTensors, so operations on whole tensors need no thought of sharding.

    Example:
        >>> class Lazy(Penalty):
        ...     def value(self, weight):
        ...         return 0 * weight.sum()
        ...
        ...     def gradient(self, weight):
        ...         return torch.zeros_like(weight)
        ...
        ...     def proximal(self, weight, step):
        ...         return weight
        >>> Lazy().value(torch.ones(2, 2))
        tensor(0.)
    """

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """Return the penalty of ``weight``, a scalar."""

    @abstractmethod
    def gradient(self, weight: Tensor) -> Tensor:
        """Return the subgradient at ``weight`` that is smallest, of the same shape."""

    @abstractmethod
    def proximal(self, weight: Tensor, step: Step) -> Tensor:
        r"""Return :math:`\arg\min_x \lambda\phi(x) + \sum_i (x_i - w_i)^2 / (2 s_i)`.

        Parikh and Boyd, "Proximal Algorithms" (2014).

        Args:
            weight: Where to start from, :math:`w`; not modified.
            step: One step size :math:`s` for all weights, or one for each: a tensor of the shape of ``weight``.
                At least 0.
        """


@dataclass(frozen=True)
class L1(Penalty):
    r"""The lasso, :math:`\lambda \sum_i |w_i|`. Its proximal map moves each weight towards zero by :math:`s\lambda`.

    Tibshirani, "Regression Shrinkage and Selection via the Lasso" (1996).

    Args:
        strength: The factor :math:`\lambda`, in [0, inf).

    Raises:
        ValueError: If ``strength`` is negative or not finite.

    Example:
        >>> L1(0.5).proximal(torch.tensor([-3.0, 0.2, 1.0]), step=1.0)
        tensor([-2.5000,  0.0000,  0.5000])
    """

    strength: float

    def __post_init__(self) -> None:
        require_in("strength", self.strength, 0, math.inf, closed="left")

    @override
    def value(self, weight: Tensor) -> Tensor:
        return self.strength * weight.abs().sum()

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return self.strength * weight.sign()

    @override
    def proximal(self, weight: Tensor, step: Step) -> Tensor:
        threshold = step * self.strength
        within = torch.clamp(weight, -threshold, threshold)  # type: ignore[arg-type]
        return weight - within  # exactly zero where the two are the same


@dataclass(frozen=True)
class L2(Penalty):
    r"""Ridge, :math:`\frac{\lambda}{2} \sum_i w_i^2`: torch's ``weight_decay``. No weight gets to zero.

    Hoerl and Kennard, "Ridge Regression: Biased Estimation for Nonorthogonal Problems" (1970).

    Args:
        strength: The factor :math:`\lambda`, in [0, inf).

    Raises:
        ValueError: If ``strength`` is negative or not finite.

    Example:
        >>> L2(0.5).proximal(torch.tensor([-3.0, 0.0, 1.5]), step=1.0)
        tensor([-2.,  0.,  1.])
    """

    strength: float

    def __post_init__(self) -> None:
        require_in("strength", self.strength, 0, math.inf, closed="left")

    @override
    def value(self, weight: Tensor) -> Tensor:
        return self.strength / 2 * weight.square().sum()

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return self.strength * weight

    @override
    def proximal(self, weight: Tensor, step: Step) -> Tensor:
        return weight / (1 + step * self.strength)


@dataclass(frozen=True)
class GroupLasso(Penalty):
    r"""Whole neurons or channels at a time, :math:`\lambda \sqrt{d} \sum_g \lVert w_g \rVert_2`.

    All groups of a weight have the same size :math:`d`; its root makes ``strength`` mean the same in every layer.

    Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables" (2006). For step sizes
    that differ within a group: Yun, Lozano and Yang, "Adaptive Proximal Gradient Methods for Structured Neural
    Networks" (2021).

    Args:
        strength: The factor :math:`\lambda`, in [0, inf).
        groups: ``"neuron"``: what one output reads, a slice of dimension 0. ``"channel"``: what one input feeds,
            a slice of dimension 1. Transposed convolutions store these two the other way round.

    Raises:
        ValueError: If an argument is out of range. Later, if a weight has less than two dimensions.

    Example:
        >>> GroupLasso(1.0).proximal(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), step=1 / math.sqrt(2))
        tensor([[2.4000, 3.2000],
                [0.0000, 0.0000]])
    """

    strength: float
    groups: Literal["neuron", "channel"] = "neuron"

    def __post_init__(self) -> None:
        require_in("strength", self.strength, 0, math.inf, closed="left")
        require_choice("groups", self.groups, ("neuron", "channel"))

    @override
    def value(self, weight: Tensor) -> Tensor:
        return self._rate(weight) * _norm(weight, self._within(weight)).sum()

    @override
    def gradient(self, weight: Tensor) -> Tensor:
        return weight / _norm(weight, self._within(weight)) * self._rate(weight)

    @override
    def proximal(self, weight: Tensor, step: Step) -> Tensor:
        threshold = step * self._rate(weight)
        if isinstance(threshold, Tensor):
            length = _length_after(weight, threshold, self._within(weight))
            return weight * (length / (length + threshold).clamp(min=_smallest(weight)))
        return weight * (1 - threshold / _norm(weight, self._within(weight))).clamp(min=0)

    def _within(self, weight: Tensor) -> tuple[int, ...]:
        """Return the dimensions over which a group extends.

        Raises:
            ValueError: If ``weight`` has less than two dimensions.
        """
        if weight.ndim < 2:
            raise ValueError(
                f"`GroupLasso` needs weights of two or more dimensions. Found shape {tuple(weight.shape)}. Use `L1`."
            )
        across = 0 if self.groups == "neuron" else 1
        return tuple(dim for dim in range(weight.ndim) if dim != across)

    def _rate(self, weight: Tensor) -> float:
        across = 0 if self.groups == "neuron" else 1
        return self.strength * math.sqrt(math.prod(weight.shape) / max(weight.shape[across], 1))


def _smallest(weight: Tensor) -> float:
    return torch.finfo(weight.dtype).tiny


def _norm(weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the norm over ``dims``, kept, and never so small that its square would vanish."""
    return weight.square().sum(dims, keepdim=True).sqrt().clamp(min=math.sqrt(_smallest(weight)))


def _length_after(weight: Tensor, threshold: Tensor, dims: tuple[int, ...]) -> Tensor:
    r"""Return the norm :math:`t` that each group of ``weight`` has after its proximal map.

    A group that stays is :math:`x_i = w_i t / (t + b_i)` with thresholds :math:`b`, so its norm solves
    :math:`h(t) = \sum_i w_i^2 / (t + b_i)^2 = 1`. As :math:`h^{-1/2}` is concave and rises, Newton's method on it
    comes from below without overshooting, and is done in one step where all :math:`b_i` are equal. Where
    :math:`h(0) \le 1` the group goes, and the method stays at zero.
    """
    bounds = (weight.abs() - threshold).amax(dims, keepdim=True)
    length = torch.maximum(bounds, _norm(weight, dims) - threshold.amax(dims, keepdim=True)).clamp(min=0)
    for _ in range(30):  # a few do, even where step sizes differ by many orders of magnitude
        reach = (length + threshold).clamp(min=_smallest(weight))
        squares = (weight / reach).square()
        h = squares.sum(dims, keepdim=True)
        slope = (squares / reach).sum(dims, keepdim=True).clamp(min=_smallest(weight))
        longer = (length + h * (h.sqrt() - 1) / slope).clamp(min=0)
        moved = (longer - length).abs() > 1e-6 * longer
        length = longer
        if not moved.any():
            break
    return length


def step_sizes(optimizer: Optimizer, group: Mapping[str, Any], parameter: Tensor) -> Step:
    r"""Return by how much ``optimizer`` just moved a weight for a unit of a gradient that stays the same.

    With this step size, and no other, a proximal map after each step of the optimizer comes to rest at a minimum
    of loss plus penalty: for SGD it is :math:`a (1 - \text{dampening}) / (1 - \text{momentum})`, for adaptive
    methods :math:`a / (\sqrt{\hat v} + \epsilon)`, one for each weight.

    Args:
        optimizer: The optimizer, which has taken a step.
        group: Its parameter group that holds ``parameter``.
        parameter: A weight that was moved.

    Returns:
        A number or a tensor of the shape of ``parameter``; the learning rate where the method is not known.
    """
    for kind, sizes in _STEP_SIZES.items():
        if isinstance(optimizer, kind):
            return sizes(group, optimizer.state[parameter])
    return float(group["lr"])


def knows_steps_of(optimizer: Optimizer) -> bool:
    """Tell whether :func:`step_sizes` knows how ``optimizer`` scales gradients."""
    return isinstance(optimizer, tuple(_STEP_SIZES))


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> Step:
    lr, momentum = float(group["lr"]), group["momentum"]
    return lr * (1 - group["dampening"]) / (1 - momentum) if momentum else lr


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> Step:
    moment = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    correction = (
        1 - group["betas"][1] ** state["step"]
    )  # a tensor, maybe on an accelerator: nothing waits for it
    return _divide(group["lr"], (widened(moment) / correction).sqrt() + group["eps"])


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> Step:
    moment = widened(state["square_avg"])
    if group["centered"]:
        moment = (moment - widened(state["grad_avg"]).square()).clamp(min=0)
    return _divide(group["lr"] / (1 - group["momentum"]), moment.sqrt() + group["eps"])


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any]) -> Step:
    lr = group["lr"] / (1 + (state["step"] - 1) * group["lr_decay"])
    return _divide(lr, widened(state["sum"]).sqrt() + group["eps"])


def _adamax(group: Mapping[str, Any], state: Mapping[str, Any]) -> Step:
    return _divide(group["lr"], widened(state["exp_inf"]))


def _divide(lr: Any, denominator: Tensor) -> Tensor:
    # `clamp(min=...)` here and above, as DTensors of torch 2.7 have no `clamp_min`.
    sizes: Tensor = lr / denominator.clamp(min=_smallest(denominator))
    return sizes


_STEP_SIZES: dict[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any]], Step]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adamax: _adamax,
}
