"""Blocks that send each row to some of several experts."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_list, require_type, require_whole
from lightning_structopt._precision import widened
from lightning_structopt._undisturbed import in_mode
from lightning_structopt.blocks.adaptive import AdaptiveBlock, Pass, flops_per_row
from lightning_structopt.blocks.rows import has_shards, over_rows, require_same_shape, touch


class RoutedBlock(AdaptiveBlock):
    r"""A residual block with a choice of bodies, :math:`y = x + \sum_{e \in \text{top-}k} w_e(x) E_e(x)`.

    A row is what the router gives one set of logits for: a sample, or a token. Each goes to the ``top_k`` experts of
    the largest :math:`p = \mathrm{softmax}(\text{router}(x))`, ties to the first, and its weights are these
    probabilities, normalized to a sum of 1 if there are several. The rest of the experts does no work for it.

    In training an expert takes at most :math:`\lceil c k R / E \rceil` of the :math:`R` rows, all first choices before
    all second ones, and in order. Rows beyond that pass by. In evaluation there is no limit, so that a sample's output
    doesn't depend on its batch. The load-balancing loss :math:`\lambda E \sum_e f_e \bar p_e`, with the share
    :math:`f_e` of choices that fell on an expert, is :math:`\lambda` where all are used alike.

    Under ``torch.compile`` the graph breaks where rows are counted. Exported graphs have the dense form, of the same
    outputs. Where FSDP2 has sharded an expert by itself, it runs on no rows rather than not at all.

    Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017
    (https://arxiv.org/abs/1701.06538); Fedus, Zoph and Shazeer, "Switch Transformers", 2021
    (https://arxiv.org/abs/2101.03961).

    Args:
        experts: Modules whose outputs have the shape of their inputs, of shape (rows, ...).
        router: Gives logits of shape (batch, experts) or (batch, tokens, experts).
        top_k: Experts a row, from 1 to all of them.
        capacity: :math:`c`, in (0, inf); None for no limit.
        balance: :math:`\lambda`, at least 0.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range. In ``forward``: if the router gives another number of logits, or an
            expert changes the shape.

    Example:
        >>> experts = [nn.Linear(4, 4) for _ in range(3)]
        >>> block = RoutedBlock(experts, router=nn.Linear(4, 3))
        >>> block(torch.randn(2, 5, 4)).shape, block.expected_cost(torch.randn(2, 5, 4)).shape
        (torch.Size([2, 5, 4]), torch.Size([10]))
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        router: nn.Module,
        top_k: int = 1,
        *,
        capacity: float | None = 1.25,
        balance: float = 0.01,
    ) -> None:
        super().__init__()
        require_list("experts", experts)
        for expert in experts:
            require_type("experts", expert, nn.Module)
        require_type("router", router, nn.Module)
        require_whole("top_k", top_k, 1)
        if top_k > len(experts):
            raise ValueError(
                f"`top_k` must be at most the number of experts. Found `top_k = {top_k}` and {len(experts)} experts. "
                "Give more experts, or a smaller `top_k`."
            )
        if capacity is not None:
            require_in("capacity", capacity, 0, math.inf, closed="neither")
        require_in("balance", balance, 0, math.inf, closed="left")
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.top_k, self.capacity, self.balance = top_k, capacity, balance

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits = self._logits(inputs)
        rows = inputs.flatten(0, logits.ndim - 2)
        probabilities = widened(logits).flatten(0, -2).softmax(-1)
        chosen = self._chosen(probabilities)
        if not (self.training or self._runs_dense) and len(rows) == 1 and not has_shards(self.experts):
            return self._one(rows, chosen, self._weights(probabilities, chosen)).reshape(inputs.shape)
        kept = self._within_capacity(chosen)
        weights = self._weights(probabilities, chosen) * kept
        run = self._all if self._runs_dense else self._some
        output = run(rows, chosen, kept, weights).reshape(inputs.shape)
        share = kept.float().mean() * self.top_k / len(self.experts)
        entry = Pass(self._imbalance(probabilities, chosen)) if self.training else None
        self._remember(share, output, entry)
        return output

    @override
    def expected_cost(self, inputs: Tensor) -> Tensor:
        """Return the operations that each row takes: its router's and those of the experts that it chooses.

        Args:
            inputs: As for ``forward``.

        Returns:
            Of shape (rows,).
        """
        logits = self._logits(inputs)
        rows = inputs.flatten(0, logits.ndim - 2)
        routing = flops_per_row(self.router, inputs) * len(inputs) / max(1, len(rows))
        costs = torch.tensor([flops_per_row(expert, rows) for expert in self.experts], device=inputs.device)
        chosen = self._chosen(widened(logits).flatten(0, -2).softmax(-1))
        return routing + costs[chosen].sum(1)

    @override
    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, capacity={self.capacity}, balance={self.balance}"

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.router(inputs)
        lead = logits.ndim - 1
        if lead < 1 or logits.shape[:lead] != inputs.shape[:lead] or logits.shape[-1] != len(self.experts):
            raise ValueError(
                f"The router of `RoutedBlock` must give {len(self.experts)} logits, one an expert, for each sample or "
                f"token. Found {tuple(logits.shape)} for inputs of shape {tuple(inputs.shape)}. End it with a linear "
                f"layer of {len(self.experts)} outputs."
            )
        return logits

    def _chosen(self, probabilities: Tensor) -> Tensor:
        """Return the experts of each row, best first and ties to the first, of shape (rows, top_k)."""
        left = probabilities.detach()
        chosen: list[Tensor] = []
        for rank in range(self.top_k):  # `topk` and `sort` promise less about ties, or can't be exported
            if rank:
                left = left.scatter(1, chosen[-1], -1)
            chosen.append(left.argmax(1, keepdim=True))
        return torch.cat(chosen, dim=1)

    def _within_capacity(self, chosen: Tensor) -> Tensor:
        """Return which choices find room, of shape (rows, top_k)."""
        if not self.training or self.capacity is None:
            return torch.ones_like(chosen, dtype=torch.bool)
        limit = math.ceil(self.capacity * self.top_k * len(chosen) / len(self.experts))
        in_order = chosen.T.flatten()  # all first choices, then all second ones
        one_hot = nn.functional.one_hot(in_order, len(self.experts))
        before = (one_hot.cumsum(0) - one_hot).gather(1, in_order[:, None])
        return (before < limit).reshape(self.top_k, -1).T

    def _weights(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        weights = probabilities.gather(1, chosen)
        # A single one stays as it is: normalized to 1 it would have no gradient.
        return weights if self.top_k == 1 else weights / weights.sum(1, keepdim=True)

    def _imbalance(self, probabilities: Tensor, chosen: Tensor) -> Tensor:
        count = len(self.experts)
        share = nn.functional.one_hot(chosen, count).to(probabilities).mean((0, 1))
        return self.balance * count * (share * probabilities.mean(0)).sum()

    def _all(self, rows: Tensor, chosen: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
        total = rows
        for index, expert in enumerate(self.experts):
            output = expert(rows)
            require_same_shape("RoutedBlock", output, rows)
            total = total + over_rows((weights * (chosen == index)).sum(1), output) * output
        return total

    def _one(self, row: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Run the experts of a single row, which is in no order."""
        total = row
        for rank, index in enumerate(chosen[0].tolist()):
            output = self.experts[index](row)
            require_same_shape("RoutedBlock", output, row)
            total = total + over_rows(weights[:, rank], output) * output
        self._remember(self.top_k / len(self.experts))
        return total

    def _some(self, rows: Tensor, chosen: Tensor, kept: Tensor, weights: Tensor) -> Tensor:
        """Run each expert on its rows alone, and add what comes back."""
        choices = chosen.masked_fill(~kept, len(self.experts)).flatten()  # what is dropped comes last
        order = choices.argsort(stable=True)
        # Waits for the device, once.
        *counts, _ = torch.bincount(choices, minlength=len(self.experts) + 1).tolist()
        order = order[: sum(counts)]
        where = order // self.top_k
        parts, total = [], rows
        for expert, mine in zip(self.experts, torch.split(rows[where], counts), strict=True):
            if len(mine) or has_shards(expert):
                parts.append(self._run(expert, mine))
                require_same_shape("RoutedBlock", parts[-1], mine)
            elif self.training and (zero := touch(expert)) is not None:
                total = total + zero
        if not parts:
            return total
        found = torch.cat(parts)
        found = over_rows(weights.flatten()[order], found) * found
        total = total.to(torch.promote_types(total.dtype, found.dtype))
        return total.index_add(0, where, found.to(total.dtype))

    def _run(self, expert: nn.Module, rows: Tensor) -> Tensor:
        # Norms have no statistics of no rows.
        with nullcontext() if len(rows) else in_mode(expert, training=False):
            output: Tensor = expert(rows)
        return output
