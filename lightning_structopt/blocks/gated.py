"""Blocks that decide for each sample whether they run."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_structopt._checks import require_in, require_type
from lightning_structopt.blocks.activations import Activation, activation_module
from lightning_structopt.blocks.adaptive import AdaptiveBlock, Pass, flops_per_row, in_backward
from lightning_structopt.blocks.gates import GateBudget, Relaxation, StraightThrough
from lightning_structopt.blocks.residual import ResidualBlock
from lightning_structopt.blocks.rows import as_logits, has_shards, over_rows, require_same_shape


class GatedBlock(AdaptiveBlock):
    r"""A residual block that runs for some of the samples, :math:`y = a(s(x) + g(x) F(x))`.

    In training all samples pass through the body and :math:`g` is relaxed, so that gradients reach the gate. In
    evaluation :math:`g = 1[l \ge 0]` for the logit :math:`l`, and only the samples with :math:`g = 1` pass through the
    body; where there are none, it doesn't run.

    Under ``torch.compile`` the evaluation graph breaks where open gates are counted, and the training graph at the end
    of the block. Exported graphs have the dense form, of the same outputs. Where FSDP2 has sharded the body by itself,
    it runs on no samples rather than not at all, as other ranks may need it.

    Args:
        body: :math:`F`, whose outputs have the shape of the shortcut's.
        gate: Gives one logit a sample, of shape (batch,) or (batch, 1), such as :class:`Gate`.
        shortcut: :math:`s`, such as :func:`projection`; the identity if not given.
        activation: :math:`a`, after the sum: a name or a module class.
        relaxation: ``StraightThrough`` or ``Annealed``.
        budget: How often the gate should be open; for all blocks together, give it to
            :func:`~lightning_structopt.blocks.auxiliary_loss` instead.
        cost: What the body costs, in any unit, against other gated blocks in a common budget.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If ``cost`` is not positive. In ``forward``: if the gate doesn't give one logit a sample, or the
            shapes of body and shortcut differ.

    Example:
        >>> from lightning_structopt.blocks.gates import Gate
        >>> block = GatedBlock(nn.Linear(4, 4), Gate(4, opening=0.1)).eval()
        >>> inputs = torch.randn(8, 4)
        >>> torch.equal(block(inputs), inputs), block.executed_fraction
        (True, 0.0)
    """

    passes: Tensor

    def __init__(
        self,
        body: nn.Module,
        gate: nn.Module,
        shortcut: nn.Module | None = None,
        *,
        activation: Activation | None = None,
        relaxation: Relaxation = StraightThrough(),  # noqa: B008  # a frozen value
        budget: GateBudget | None = None,
        cost: float = 1.0,
    ) -> None:
        super().__init__()
        _require_parts(body, gate, shortcut)
        require_type("relaxation", relaxation, Relaxation)
        if budget is not None:
            require_type("budget", budget, GateBudget)
        require_in("cost", cost, 0, math.inf, closed="neither")
        self.body = body
        self.gate = gate
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.activation = nn.Identity() if activation is None else activation_module(activation)
        self.relaxation, self.budget, self.cost = relaxation, budget, cost
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    @classmethod
    def around(cls, block: ResidualBlock, gate: nn.Module, **options: Any) -> "GatedBlock":
        """Return ``block`` with a gate: its body, shortcut and activation, and no stochastic depth.

        Args:
            block: The block, whose parts are shared, not copied.
            gate: As of the class.
            options: ``relaxation``, ``budget`` and ``cost``, as of the class.

        Returns:
            The gated block.

        Example:
            >>> from lightning_structopt.blocks.gates import Gate
            >>> GatedBlock.around(ResidualBlock(nn.Linear(4, 4), activation="relu"), Gate(4)).activation
            ReLU()
        """
        require_type("block", block, ResidualBlock)
        gated = cls(block.body, gate, block.shortcut, **options)
        gated.activation = block.activation
        return gated

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        logits = self._logits(inputs)
        around = self.shortcut(inputs)
        if self.training:
            return self._train(inputs, around, logits)
        if not self._runs_dense and len(logits) == 1:
            total = self._one(inputs, around, logits)
        else:
            opened = logits >= 0
            run = self._all if self._runs_dense else self._some
            total = run(inputs, around, opened)
            self._remember(opened)
        output: Tensor = self.activation(total)
        return output

    @override
    def expected_cost(self, inputs: Tensor) -> Tensor:
        r"""Return the operations that each sample is expected to take, :math:`c_g + c_s + \sigma(l) c_F`.

        Args:
            inputs: As for ``forward``.

        Returns:
            Of shape (batch,), with gradients for the gate.
        """
        always = flops_per_row(self.gate, inputs) + flops_per_row(self.shortcut, inputs)
        return always + torch.sigmoid(self._logits(inputs)) * flops_per_row(self.body, inputs)

    @override
    def extra_repr(self) -> str:
        return f"relaxation={self.relaxation!r}, budget={self.budget!r}, cost={self.cost!r}"

    def _logits(self, inputs: Tensor) -> Tensor:
        return as_logits("GatedBlock", self.gate(inputs), inputs)

    def _train(self, inputs: Tensor, around: Tensor, logits: Tensor) -> Tensor:
        gates = self.relaxation(logits, self._count())
        output: Tensor = self.activation(self._all(inputs, around, gates))
        share = gates.mean()
        loss = None if self.budget is None else self.budget.penalty(share, [1.0])
        self._remember(share, output, Pass(loss, share))
        return output

    def _count(self) -> Tensor:
        """Return how many training passes there were before this one, and count it."""
        if in_backward():  # the same pass again, which must see what it saw
            return self.passes - 1
        before = self.passes.clone()
        self.passes.add_(1)
        return before

    def _all(self, inputs: Tensor, around: Tensor, gates: Tensor) -> Tensor:
        through: Tensor = self.body(inputs)
        require_same_shape("GatedBlock", through, around)
        return around + over_rows(gates, through) * through

    def _plain(self, inputs: Tensor, around: Tensor) -> Tensor:
        through: Tensor = self.body(inputs)
        require_same_shape("GatedBlock", through, around)
        return around + through

    def _one(self, inputs: Tensor, around: Tensor, logits: Tensor) -> Tensor:
        """Decide about a single sample in Python: operators on one number take as long as a small body."""
        opened = logits.item() >= 0  # waits for the device
        self._remember(float(opened))
        if opened:
            return self._plain(inputs, around)
        return self._some(inputs, around, logits >= 0) if has_shards(self.body) else around

    def _some(self, inputs: Tensor, around: Tensor, opened: Tensor) -> Tensor:
        rows = opened.nonzero()[:, 0]
        if len(rows) == 0 and not has_shards(self.body):
            return around
        if len(rows) == len(inputs):
            return self._plain(inputs, around)
        through: Tensor = self.body(inputs[rows])
        require_same_shape("GatedBlock", through, around[rows])
        total = around.to(torch.promote_types(around.dtype, through.dtype))
        return total.index_add(0, rows, through.to(total.dtype))


def _require_parts(body: nn.Module, gate: nn.Module, shortcut: nn.Module | None) -> None:
    require_type("body", body, nn.Module)
    require_type("gate", gate, nn.Module)
    if shortcut is not None:
        require_type("shortcut", shortcut, nn.Module)
    if isinstance(body, ResidualBlock):
        raise TypeError(
            "The body of `GatedBlock` must be what a closed gate skips, without the way around it. Found a "
            "`ResidualBlock`. Use `GatedBlock.around(block, gate)`."
        )
