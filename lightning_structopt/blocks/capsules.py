"""Capsules that agree on where their outputs go."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_whole
from lightning_structopt._precision import widened


class CapsuleRouting(nn.Module):
    r"""Routing by agreement between two layers of capsules.

    Each input capsule :math:`i` predicts each output capsule, :math:`\hat u_{j|i} = W_{ij} u_i`. Starting from
    :math:`b = 0`, each iteration takes :math:`c_i = \mathrm{softmax}_j(b_{ij})`,
    :math:`v_j = \mathrm{squash}(\sum_i c_{ij} \hat u_{j|i})` and adds the agreement
    :math:`\hat u_{j|i} \cdot v_j` to :math:`b_{ij}`.

    It adds computation. For routing that saves some, see :class:`RoutedBlock`.

    Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017 (https://arxiv.org/abs/1710.09829).

    Args:
        in_capsules: Input capsules.
        in_features: The length of their vectors.
        out_capsules: Output capsules, such as classes.
        out_features: The length of their vectors.
        iterations: Of routing, at least 1.

    Raises:
        TypeError: If an argument is not a whole number.
        ValueError: If one is below 1. In ``forward``: if the inputs have another shape.

    Example:
        >>> CapsuleRouting(6, 4, 10, 8)(torch.randn(2, 6, 4)).norm(dim=-1).max() < 1
        tensor(True)
    """

    def __init__(
        self, in_capsules: int, in_features: int, out_capsules: int, out_features: int, iterations: int = 3
    ) -> None:
        super().__init__()
        sizes = {
            "in_capsules": in_capsules,
            "in_features": in_features,
            "out_capsules": out_capsules,
            "out_features": out_features,
            "iterations": iterations,
        }
        for name, size in sizes.items():
            require_whole(name, size, 1)
        self.iterations = iterations
        self.weight = nn.Parameter(torch.empty(in_capsules, out_capsules, out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    @override
    def forward(self, capsules: Tensor) -> Tensor:
        """Route.

        Args:
            capsules: Of shape (batch, in_capsules, in_features).

        Returns:
            Of shape (batch, out_capsules, out_features), each vector shorter than 1.

        Raises:
            ValueError: If ``capsules`` has another shape.
        """
        count, _, _, features = self.weight.shape
        if capsules.ndim != 3 or capsules.shape[1:] != (count, features):
            raise ValueError(
                f"`CapsuleRouting` needs inputs of shape (batch, {count}, {features}). Found {tuple(capsules.shape)}. "
                "Reshape them to vectors of capsules."
            )
        predictions = torch.einsum("ijof,bif->bijo", self.weight, capsules)
        return route(widened(predictions), self.iterations).to(predictions.dtype)

    @override
    def extra_repr(self) -> str:
        count, out_capsules, out_features, features = self.weight.shape
        return f"{count}, {features}, {out_capsules}, {out_features}, iterations={self.iterations}"


def route(predictions: Tensor, iterations: int) -> Tensor:
    """Return the outputs that ``predictions`` of shape (batch, in, out, features) agree on.

    Args:
        predictions: What each input capsule expects of each output capsule.
        iterations: At least 1.

    Returns:
        Of shape (batch, out, features).
    """
    agreement = predictions.new_zeros(predictions.shape[:3])
    for iteration in range(iterations):
        coupling = agreement.softmax(2).unsqueeze(-1)
        outputs = squash((coupling * predictions).sum(1))
        if iteration < iterations - 1:
            agreement = agreement + (predictions * outputs.unsqueeze(1)).sum(-1)
    return outputs


def squash(vectors: Tensor) -> Tensor:
    r"""Return :math:`\frac{|s|^2}{1 + |s|^2} \frac{s}{|s|}`: short vectors almost zero, long ones almost of length 1.

    Args:
        vectors: Of shape (..., features).

    Returns:
        Of the same shape.

    Example:
        >>> squash(torch.tensor([3.0, 0.0, 0.0]))
        tensor([0.9000, 0.0000, 0.0000])
    """
    # Its gradient is zero at zero, where that of a square root is none.
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors * length / (1 + length**2)
