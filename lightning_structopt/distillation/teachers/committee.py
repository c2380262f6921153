"""Several teachers as one."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_choice, require_in, require_list, require_type
from lightning_structopt._precision import widened
from lightning_structopt.distillation.taps import LOGITS, tensor_of


class Teachers(nn.Module):
    r"""Asks several teachers and puts what they say together.

    With weights :math:`w_k` that sum to 1: the mean of outputs :math:`\sum_k w_k z_k`, the logarithm of the mean of
    probabilities :math:`\log \sum_k w_k \, \mathrm{softmax}(z_k)`, or for each sample the output of the teacher that is
    surest of its answer, :math:`\arg\max_k w_k \max_c \mathrm{softmax}(z_k)_c`.

    Shapes: outputs (N, C), (N, C, ...) or, with ``class_dim=-1``, (N, L, C). You et al., "Learning from Multiple
    Teacher Networks", 2017.

    Args:
        members: The teachers, one at least, of the same classes. Their modules are called ``members.0.layer2``.
        weights: How much each counts, in [0, inf), not all 0; by default all the same.
        combine: ``"outputs"``, ``"probabilities"`` or ``"confidence"``.
        class_dim: Which dimension the classes are in.

    Raises:
        ValueError: If there is no member, weights don't fit, or ``combine`` is none of these. Later, if members return
            different shapes.

    Example:
        >>> sure, unsure = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = sure.weight.copy_(torch.tensor([[9.0], [0.0]])), unsure.weight.zero_()
        >>> Teachers([unsure, sure], combine="confidence")(torch.ones(1, 1)).detach()
        tensor([[9., 0.]])
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        weights: Sequence[float] | None = None,
        combine: Literal["outputs", "probabilities", "confidence"] = "outputs",
        class_dim: int = 1,
    ) -> None:
        super().__init__()
        require_choice("combine", combine, ("outputs", "probabilities", "confidence"))
        require_list("members", members)
        for member in members:
            require_type("members", member, nn.Module)
        require_type("class_dim", class_dim, int)
        if weights is not None:
            require_list("weights", weights)
        given = [1.0] * len(members) if weights is None else list(weights)
        for weight in given:
            require_in("weights", weight, 0, math.inf, closed="left")
        if len(given) != len(members) or not sum(given) > 0:
            raise ValueError(
                f"`Teachers` needs a member at least and a weight for each, not all 0. Found {len(members)} members "
                f"and `weights = {weights}`."
            )
        self.members = nn.ModuleList(members)
        self.weights = tuple(weight / sum(given) for weight in given)
        self.combine = combine
        self.class_dim = class_dim

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        outputs = [tensor_of(member(*args, **kwargs), LOGITS, "teacher") for member in self.members]
        shapes = {tuple(output.shape) for output in outputs}
        if len(shapes) > 1:
            raise ValueError(
                f"`Teachers` must return outputs of one shape. Found {sorted(shapes)}. Wrap those that differ in a "
                "module that brings them to the same classes."
            )
        stacked = torch.stack([widened(output) for output in outputs])
        weights = stacked.new_tensor(self.weights).view(-1, *[1] * (stacked.ndim - 1))
        if self.combine == "outputs":
            return (weights * stacked).sum(0)
        dim = self.class_dim if self.class_dim < 0 else self.class_dim + 1
        if self.combine == "probabilities":
            return (weights.log() + stacked.log_softmax(dim)).logsumexp(0)
        sureness = (weights * stacked.softmax(dim)).amax(dim)
        best = sureness.flatten(2).mean(2).argmax(0) if sureness.ndim > 2 else sureness.argmax(0)
        return stacked[best, torch.arange(stacked.shape[1], device=stacked.device)]
