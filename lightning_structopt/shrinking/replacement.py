"""Making a module smaller where it is, in the middle of training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    replace_in_place(
        tensors,
        optimizers,
        data=lambda name, tensor: smaller_tensor(tensor, plan.kept[name]),
        gradient=lambda name, gradient: smaller_tensor(gradient, plan.kept[name]),
        state=lambda name, state: smaller_state(state, tensors[name].shape, plan.kept[name]),
    )
    set_attributes(module, plan.attributes)


@torch.no_grad()
def replace_in_place(
    tensors: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    *,
    data: Callable[[str, Tensor], Tensor],
    gradient: Callable[[str, Tensor], Tensor],
    state: Callable[[str, Mapping[str, Any]], dict[str, Any]],
) -> None:
    """Give parameters and buffers data of other shapes, and with them what belongs to them.

    Args:
        tensors: Parameters and buffers by name; they stay the same objects.
        optimizers: Those that move them.
        data: Returns what a tensor becomes. Called in the order of ``tensors``.
        gradient: Returns what its gradient becomes.
        state: Returns what an optimizer remembers of it afterwards. It may fail: nothing has changed then.
    """
    states = [
        {
            each: state(name, optimizer.state[each])
            for name, each in tensors.items()
            if each in optimizer.state
        }
        for optimizer in optimizers
    ]
    for optimizer, own in zip(optimizers, states, strict=True):
        optimizer.state.update(own)
    for name, tensor in tensors.items():
        waiting, tensor.grad = tensor.grad, None
        _replace_data(tensor, data(name, tensor))
        if waiting is not None:
            tensor.grad = gradient(name, waiting)


def _replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` data of another shape."""
    if tensor.requires_grad:
        # Autograd's node that adds up gradients may outlive a step and knows the shape. It is made anew when the
        # type changes, not when the shape does.
        other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
