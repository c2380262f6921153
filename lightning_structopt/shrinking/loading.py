"""Loading the smaller module of a checkpoint."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_structopt._checkpoints import read_checkpoint, state_dict_of
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.saved_plan import naming_what_is_there

OWNER = "ChannelPruning"  # under this key Lightning keeps the callback's state in a checkpoint
_Module = TypeVar("_Module")


def load_shrunk(module_class: type[_Module], checkpoint: str | Path, **init: Any) -> _Module:
    """Load the smaller module of a checkpoint that a training with ``ChannelPruning`` saved.

    The module is made as ``load_from_checkpoint`` makes it, and then shrunk by the plan in the checkpoint. Nothing
    that is read can run code.

    Args:
        module_class: The LightningModule's class.
        checkpoint: The file. It must have been saved after the pruning window closed.
        **init: Arguments of the class, as for ``load_from_checkpoint``: those that ``save_hyperparameters`` did not
            save.

    Returns:
        The smaller module, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one without a plan.

    Example:
        >>> small = load_shrunk(MyModule, "last.ckpt")  # doctest: +SKIP
    """
    loaded = read_checkpoint(checkpoint)
    plan = plan_in(loaded)
    if plan is None:
        raise ValueError(
            "A checkpoint with a smaller module is saved by a training with `ChannelPruning`, after its window "
            f"closed. Found none of its plans in {str(checkpoint)!r}. Take a later checkpoint, or load the module "
            "and call `so.shrink(module, example_input)`."
        )
    loaded["state_dict"] = whole_again(state_dict_of(loaded, checkpoint), plan)
    module = made_from(module_class, loaded, **init)
    small: _Module = plan.apply(module)  # type: ignore[assignment]
    return small


def plan_in(checkpoint: Mapping[str, Any]) -> ShrinkPlan | None:
    """Return the plan in a checkpoint, if it has one."""
    data = plan_data(checkpoint, OWNER)
    return None if data is None else ShrinkPlan.from_data(data)


def plan_data(checkpoint: Mapping[str, Any], owner: str) -> Any:
    """Return the data of the plan that a callback left in a checkpoint; None if there is none."""
    found: Any = checkpoint
    for key in ("callbacks", owner, "plan"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def made_from(module_class: Any, checkpoint: Mapping[str, Any], **arguments: Any) -> Any:
    """Return the module that ``load_from_checkpoint`` makes of a checkpoint that has been read and changed.

    Args:
        module_class: The LightningModule's class.
        checkpoint: The checkpoint.
        **arguments: For ``load_from_checkpoint``.

    Raises:
        ValueError: If the class or the arguments don't fit.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    try:
        return module_class.load_from_checkpoint(buffer, map_location="cpu", weights_only=True, **arguments)
    except (RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"A checkpoint must be of its class. Found that `{module_class.__name__}` can't load it: {error} Give the "
            "class that saved it, and the arguments that `save_hyperparameters` did not save."
        ) from error


def whole_again(state: Mapping[str, Tensor], plan: ShrinkPlan) -> dict[str, Tensor]:
    """Put zeros where a smaller module's state dict has nothing any more; what is whole stays.

    Args:
        state: A state dict, of the module before or after it was made smaller.
        plan: What is kept.
    """
    small = plan.small_shapes()
    # Tied weights have several names in a state dict, of which the plan has the first.
    first = {state[name].data_ptr(): name for name in small if name in state}
    result = dict(state)
    with naming_what_is_there():
        for name, tensor in state.items():
            known = name if name in small else first.get(tensor.data_ptr())
            if known is not None and list(tensor.shape) == small[known]:
                result[name] = _scattered(tensor, plan.kept[known], plan.shapes[known])
    return result


def _scattered(small: Tensor, kept: Mapping[int, list[int]], shape: list[int]) -> Tensor:
    whole = small.new_zeros(shape)
    places = [torch.tensor(kept.get(dim, range(size))) for dim, size in enumerate(shape)]
    whole[torch.meshgrid(*places, indexing="ij")] = small
    return whole
