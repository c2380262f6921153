"""One optimizer for each member, from whatever its ``configure_optimizers`` returns."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


def one_optimizer(name: str, returned: Any) -> dict[str, Any]:
    """Return the optimizer and, if there is one, the scheduler, as Lightning takes them of several modules.

    Args:
        name: What the member is called.
        returned: What ``configure_optimizers`` returned.

    Raises:
        ValueError: If that is not exactly one optimizer with one scheduler at most.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> one_optimizer("a", ([optimizer], []))["optimizer"] is optimizer
        True
    """
    optimizers, schedulers = _lists(returned)
    if len(optimizers) != 1 or len(schedulers) > 1:
        raise ValueError(
            f"Each member of `MutualDistillation` has one optimizer, and one scheduler at most. Found "
            f"{len(optimizers)} and {len(schedulers)} in member `{name}`. Let its `configure_optimizers` return one."
        )
    if not schedulers:
        return {"optimizer": optimizers[0]}
    given = schedulers[0]
    scheduler = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    for key in (
        "monitor",
        "strict",
        "reduce_on_plateau",
    ):  # Lightning warns of them where it doesn't step itself
        scheduler.pop(key, None)
    return {"optimizer": optimizers[0], "lr_scheduler": scheduler}


def monitored(name: str, returned: Any) -> str | None:
    """Return the metric that the scheduler in ``returned`` watches, as it is logged of member ``name``.

    Args:
        name: What the member is called.
        returned: What ``configure_optimizers`` returned.
    """
    _, schedulers = _lists(returned)
    watched = [s["monitor"] for s in schedulers if isinstance(s, Mapping) and s.get("monitor")]
    return f"{name}/{watched[0]}" if watched else None


def _lists(returned: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(returned, Optimizer):
        return [returned], []
    if isinstance(returned, Mapping):
        scheduler = returned.get("lr_scheduler")
        return [returned["optimizer"]], [] if scheduler is None else [scheduler]
    if isinstance(returned, (list, tuple)) and len(returned) == 1:
        return _lists(returned[0])
    if isinstance(returned, (list, tuple)) and len(returned) == 2 and isinstance(returned[0], (list, tuple)):
        return list(returned[0]), list(returned[1])
    return list(returned or ()), []
