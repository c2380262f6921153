"""What was pruned, for people."""

from collections.abc import Mapping

from rich.table import Table
from torch import Tensor


def sparsity_table(masks: Mapping[str, Tensor]) -> Table:
    """Return a table of each parameter's shape, zeros and sparsity, with the total in the last row.

    Args:
        masks: Bool masks by parameter name, True where a weight is kept.
    """
    table = Table(title="Pruned weights")
    table.add_column("parameter", overflow="fold")
    for column in ("shape", "zeros", "of", "sparsity"):
        table.add_column(column, justify="right")
    zeros = {name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()}
    for name, mask in masks.items():
        table.add_row(name, " x ".join(map(str, mask.shape)), *_counts(zeros[name], mask.numel()))
    table.add_section()
    table.add_row("total", "", *_counts(sum(zeros.values()), sum(mask.numel() for mask in masks.values())))
    return table


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """Return the fraction of weights that ``masks`` prune; 0 if there are none."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total if total else 0.0


def unfinished(sparsity: float, target: float) -> str:
    """Return the warning for a training that stopped at ``sparsity``, below ``target``."""
    return (
        f"Training ended before the pruning window closed: sparsity is {sparsity:.4f}, the target "
        f"{target}. Train to the end of the window, or give a smaller `end`."
    )


def _counts(zeros: int, total: int) -> tuple[str, str, str]:
    return f"{zeros:,}", f"{total:,}", f"{zeros / total:.2%}"
