"""What adaptive blocks add to the loss, in one line of the user's training step."""

import torch
from torch import Tensor, nn

from lightning_structopt._checks import require_type
from lightning_structopt.blocks.adaptive import AdaptiveBlock, adaptive_blocks
from lightning_structopt.blocks.gated import GatedBlock
from lightning_structopt.blocks.gates import GateBudget


def auxiliary_loss(module: nn.Module, budget: GateBudget | None = None) -> Tensor:
    r"""Return the sum of the auxiliary losses of all adaptive blocks in ``module``.

    Write ``loss = loss + so.auxiliary_loss(self)`` in ``training_step``, after the forward pass. Blocks that ran
    several times since the last step count each time; blocks that did not run count nothing; asked twice, the answer
    is the same. Nothing is kept once backward has gone through a block. In evaluation and without gradients blocks
    keep nothing, so the sum is zero then.

    With activation checkpointing, use ``use_reentrant=False``: the other kind runs the forward pass without gradients.
    Under DDP each rank adds the loss of its own rows, and gradients are averaged.

    Args:
        module: The module, such as your LightningModule.
        budget: For all gated blocks together that have no budget of their own,
            :math:`(\sum_i c_i \bar g_i / \sum_i c_i - t)^2` with the costs :math:`c_i` and the shares of rows
            :math:`\bar g_i`.

    Returns:
        A scalar with a graph.

    Raises:
        TypeError: If ``budget`` is no ``GateBudget``.
        ValueError: If ``module`` has no adaptive blocks, ``budget`` concerns none, or all that they had to say is
            gone: backward has been called, or the forward pass ran without gradients.

    Example:
        >>> from lightning_structopt.blocks import Gate, GatedBlock
        >>> block = GatedBlock(nn.Linear(4, 4), Gate(4), budget=GateBudget(0.5, strength=2.0))
        >>> _ = block(torch.randn(8, 4))
        >>> auxiliary_loss(block) <= 2 * 0.25
        tensor(True)
    """
    blocks = list(adaptive_blocks(module).values())
    if not blocks:
        raise ValueError(
            f"`auxiliary_loss` needs a module with adaptive blocks. Found none in `{type(module).__name__}`. Add a "
            "`GatedBlock`, `RoutedBlock` or `AdaptiveComputationUnit`, or leave the term out."
        )
    _drop_stale(blocks)
    if module.training and torch.is_grad_enabled():
        _require_told(blocks)
    terms = [entry.loss for block in blocks for entry in block._passes.waiting if entry.loss is not None]
    if budget is not None:
        terms += _of_budget(blocks, budget)
    for block in blocks:
        block._passes.collected = bool(block._passes.waiting)
    return torch.stack([term.reshape(()) for term in terms]).sum() if terms else _zero(module)


def _drop_stale(blocks: list[AdaptiveBlock]) -> None:
    """Forget what was collected before, if there is something new: those blocks did not run since."""
    if any(block._passes.waiting and not block._passes.collected for block in blocks):
        for block in blocks:
            if block._passes.collected:
                block._passes.clear()


def _require_told(blocks: list[AdaptiveBlock]) -> None:
    if any(block._passes.waiting for block in blocks) or not any(block._passes.missed for block in blocks):
        return
    raise ValueError(
        "`auxiliary_loss` must come after a forward pass with gradients and before its backward pass, while what it "
        "computed is still in use. Found adaptive blocks that ran in training and have nothing to tell any more. Call "
        "it in `training_step`, before you return the loss; give `torch.utils.checkpoint.checkpoint` "
        "`use_reentrant=False`."
    )


def _of_budget(blocks: list[AdaptiveBlock], budget: GateBudget) -> list[Tensor]:
    require_type("budget", budget, GateBudget)
    gated = [block for block in blocks if isinstance(block, GatedBlock) and block.budget is None]
    if not gated:
        raise ValueError(
            "`budget` is for gated blocks without a budget of their own. Found none. Leave it out here, or in the "
            "blocks."
        )
    shares, costs = [], []
    for block in gated:
        for entry in block._passes.waiting:
            assert entry.executed is not None
            shares.append(entry.executed)
            costs.append(block.cost)
    return [budget.penalty(torch.stack(shares), costs)] if shares else []


def _zero(module: nn.Module) -> Tensor:
    device = next((parameter.device for parameter in module.parameters()), None)
    return torch.zeros((), device=device)
