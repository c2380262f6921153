"""Loading the grown module of a checkpoint."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning_structopt._checkpoints import read_checkpoint, state_dict_of
from lightning_structopt.growth.plan import GrowthPlan
from lightning_structopt.shrinking.loading import made_from, plan_data
from lightning_structopt.shrinking.saved_plan import naming_what_is_there

OWNER = "NetworkGrowth"  # under this key Lightning keeps the callback's state in a checkpoint
_Module = TypeVar("_Module")


def load_grown(module_class: type[_Module], checkpoint: str | Path, **init: Any) -> _Module:
    """Load the module of a checkpoint that a training with ``NetworkGrowth`` saved, as large as it was then.

    The module is made as ``load_from_checkpoint`` makes it, grows by the plan in the checkpoint, and takes the weights.
    Nothing that is read can run code. An ``on_load_checkpoint`` of the module sees an empty state dict.

    Args:
        module_class: The LightningModule's class.
        checkpoint: The file.
        **init: Arguments of the class, as for ``load_from_checkpoint``: those that ``save_hyperparameters`` did not
            save.

    Returns:
        The module, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is of another training, or the class or its arguments don't fit.

    Example:
        >>> module = load_grown(MyModule, "last.ckpt")  # doctest: +SKIP
    """
    loaded = read_checkpoint(checkpoint)
    plan = plan_in(loaded)
    if plan is None:
        raise ValueError(
            "A checkpoint with a grown module is saved by a training with `NetworkGrowth`. Found none of its plans in "
            f"{str(checkpoint)!r}. Load it by `{module_class.__name__}.load_from_checkpoint`."
        )
    state, loaded["state_dict"] = state_dict_of(loaded, checkpoint), {}
    with warnings.catch_warnings():  # of an empty state dict, which is meant
        warnings.filterwarnings("ignore", ".*keys that are in the model state dict but not in the checkpoint")
        warnings.filterwarnings("ignore", "The state dict in .* contains no parameters")
        module = made_from(module_class, loaded, strict=False, **init)
    plan.apply_in_place(module)
    with naming_what_is_there():
        module.load_state_dict(state)
    grown: _Module = module
    return grown


def plan_in(checkpoint: Mapping[str, Any]) -> GrowthPlan | None:
    """Return the plan in a checkpoint, if it has one."""
    data = plan_data(checkpoint, OWNER)
    return None if data is None else GrowthPlan.from_data(data)
