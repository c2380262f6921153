"""Making a module smaller where it is, in the middle of training."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_structopt.shrinking.optimizer_state import smaller_state
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.surgery import set_attributes, smaller_tensor
from lightning_structopt.shrinking.tracing import tensors_of


@torch.no_grad()
def shrink_in_place(module: nn.Module, plan: ShrinkPlan, optimizers: Sequence[Optimizer] = ()) -> None:
    """Make ``module`` smaller where it is.

    Parameters and buffers stay the same objects, with other data, so that whoever refers to them (optimizers,
    callbacks, tied layers) goes on doing so. What optimizers remember of what is kept is unchanged, and so are
    gradients that wait for a step.

    Args:
        module: The module, of the class and the shapes that the plan was made for.
        plan: What to keep.
        optimizers: Those that move its parameters.

    Raises:
        ValueError: If the plan does not fit the module, needs an exported graph, or the state of an optimizer can't
            be cut. Nothing has changed then.
    """
    if plan.form == "graph":
        raise ValueError(
            'A module can be made smaller in place where its class stays. Found a plan with `form="graph"`. Use '
            "`plan.apply`."
        )
    plan.require_fits(module)
    tensors = {name: each for name, each in tensors_of(module).items() if name in plan.kept}
    # All that may fail comes first.
    states = [_smaller_states(optimizer, tensors, plan.kept) for optimizer in optimizers]
    for optimizer, own in zip(optimizers, states, strict=True):
        optimizer.state.update(own)
    for name, tensor in tensors.items():
        if tensor.grad is not None:
            gradient, tensor.grad = smaller_tensor(tensor.grad, plan.kept[name]), None
            replace_data(tensor, smaller_tensor(tensor, plan.kept[name]))
            tensor.grad = gradient
        else:
            replace_data(tensor, smaller_tensor(tensor, plan.kept[name]))
    set_attributes(module, plan.attributes)


def _smaller_states(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], kept: Mapping[str, Mapping[int, list[int]]]
) -> dict[Tensor, dict[str, object]]:
    return {
        tensor: smaller_state(optimizer.state[tensor], tensor.shape, kept[name])
        for name, tensor in tensors.items()
        if tensor in optimizer.state
    }


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` data of another shape."""
    if tensor.requires_grad:
        # Autograd's node that adds up gradients may outlive a step and knows the shape. It is made anew when the
        # type changes, not when the shape does.
        other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
