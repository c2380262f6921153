"""Pruning a module now, without a Trainer."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_structopt._checks import require_in, require_type
from lightning_structopt.pruning.criteria import Criterion, Evidence, Magnitude, Scores
from lightning_structopt.pruning.masks import MaskSet
from lightning_structopt.pruning.outputs import Outputs
from lightning_structopt.pruning.patterns import Pattern, Unstructured
from lightning_structopt.pruning.selection import Pick, Spare, row_biases, select_parameters


def prune(
    module: nn.Module,
    sparsity: float,
    *,
    criterion: Criterion | None = None,
    pattern: Pattern | None = None,
    include: Pick | Sequence[Pick] | None = None,
    exclude: Pick | Sequence[Pick] | None = None,
    spare: Spare | None = None,
) -> dict[str, Tensor]:
    """Zero the least important weights of ``module`` in place.

    Nothing holds them at zero afterwards: to train on, use :class:`~lightning_structopt.IterativePruning`, or
    multiply the weights by the masks after each optimizer step.

    Args:
        module: The module to prune; its state-dict keys stay as they are.
        sparsity: Fraction of the chosen weights to be zero, in [0, 1), hit exactly.
        criterion: How important a weight is; :class:`~lightning_structopt.Magnitude` if not given.
        pattern: Which weights go together; ``Unstructured()`` if not given.
        include: Globs on parameter names or module types, as in
            :class:`~lightning_structopt.IterativePruning`.
        exclude: Likewise, what to leave out.
        spare: ``"first"``, ``"last"`` or ``"both"``: the layer of the first or last chosen weight stays dense.

    Returns:
        The masks by parameter name: bool, of the parameter's shape, True where a weight is kept.

    Raises:
        TypeError: If an argument is of the wrong kind, or a chosen parameter can't be pruned.
        ValueError: If ``sparsity`` is out of range or nothing is chosen.

    Example:
        >>> module = nn.Linear(10, 10)
        >>> masks = prune(module, 0.9)
        >>> int((module.weight == 0).sum()), masks["weight"].shape
        (90, torch.Size([10, 10]))
    """
    require_in("sparsity", sparsity, 0, 1, closed="left")
    criterion = Magnitude() if criterion is None else criterion
    pattern = Unstructured() if pattern is None else pattern
    require_type("criterion", criterion, Criterion)
    require_type("pattern", pattern, Pattern)
    masks = masks_for(module, sparsity, pattern, include, exclude, spare)
    advance(masks, sparsity, criterion, pattern, lambda: Evidence(module, sharding=masks.sharding))
    return masks.masks()


def masks_for(
    module: nn.Module,
    sparsity: float,
    pattern: Pattern,
    include: Pick | Sequence[Pick] | None,
    exclude: Pick | Sequence[Pick] | None,
    spare: Spare | None,
) -> MaskSet:
    """Choose the weights of ``module`` to prune, check that ``pattern`` fits them, and set up their masks."""
    weights = select_parameters(module, include, exclude, spare)
    outputs = Outputs.of(module, weights) if pattern.by_output else Outputs()
    pattern.require(sparsity, {name: outputs.first(name, weight) for name, weight in weights.items()})
    return MaskSet(weights, row_biases(module, weights, outputs) if pattern.takes_bias else None, outputs)


@torch.no_grad()
def advance(
    masks: MaskSet,
    sparsity: float,
    criterion: Criterion,
    pattern: Pattern,
    evidence: Callable[[], Evidence] = Evidence,
) -> bool:
    """Raise the sparsity of ``masks`` to ``sparsity`` and say whether anything changed.

    Args:
        masks: What to change.
        sparsity: The fraction of weights that are pruned afterwards.
        criterion: How important a weight is.
        pattern: Which weights go together.
        evidence: Returns what is known besides the weights; called only if something is to be pruned, as
            there may be nothing known yet when a ramp starts at zero.
    """
    if sparsity * masks.total < 0.5:
        return False
    before, outputs = masks.pruned, masks.outputs
    scores = criterion.score(masks.weights(), evidence())
    rows = Scores({name: outputs.first(name, values) for name, values in scores.values.items()}, scores.power)
    keep = {name: outputs.first(name, mask) for name, mask in masks.masks().items()}
    chosen = pattern.choose(rows, keep, sparsity, masks.sharding)
    masks.update({name: outputs.back(name, mask) for name, mask in chosen.items()})
    return masks.pruned != before
