"""Connected components, on tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def connected_components(size: int, edges: Sequence[Tensor]) -> Tensor:
    """Return for each of ``size`` nodes the smallest node that it is connected to.

    Args:
        size: How many nodes there are.
        edges: int64 tensors of shape (2, n): what is connected with what.

    Example:
        >>> connected_components(5, [torch.tensor([[4, 2], [3, 3]])])
        tensor([0, 1, 2, 2, 2])
    """
    roots = torch.arange(size)
    if not edges:
        return roots
    one, other = torch.cat(list(edges), 1)
    while True:
        lower = torch.minimum(roots[one], roots[other])
        # The roots of both ends move, not the ends alone: whole trees are hooked at once.
        hooked = roots.scatter_reduce(0, roots[one], lower, "amin").scatter_reduce(
            0, roots[other], lower, "amin"
        )
        while not torch.equal(jumped := hooked[hooked], hooked):
            hooked = jumped
        if torch.equal(hooked, roots):
            return roots
        roots = hooked
        unequal = roots[one] != roots[other]
        one, other = one[unequal], other[unequal]
