"""What growth needs of the trainer it runs in."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_structopt._undisturbed import compiled_parts
from lightning_structopt.growth.loading import plan_in
from lightning_structopt.growth.plan import GrowthPlan
from lightning_structopt.pruning import IterativePruning
from lightning_structopt.pruning.host import averaged_modules
from lightning_structopt.shrinking import ChannelPruning
from lightning_structopt.shrinking.host import being_loaded, require_replaceable
from lightning_structopt.shrinking.tracing import tensors_of

Order = list[list[list[str]]]  # of each optimizer and group, the names of its parameters


def require_fitting_trainer(trainer: Any, module: nn.Module) -> None:
    """Raise if a module can't grow as ``trainer`` trains it.

    Raises:
        ValueError: If the strategy, an optimizer, another callback or compilation does not fit.
    """
    remedy = "Train with one of these; or grow by `so.widen` or `so.deepen` between two trainings."
    require_replaceable(trainer, "`NetworkGrowth`", remedy)
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        raise ValueError(
            "What an optimizer remembers grows parameter by parameter. Found `LBFGS`, which keeps all in one. Use SGD, "
            "Adam, AdamW or another first-order optimizer."
        )
    for other in trainer.callbacks:
        if isinstance(other, (IterativePruning, ChannelPruning)):
            raise ValueError(
                "A parameter must keep its shape while it is pruned. Found `NetworkGrowth` with "
                f"`{type(other).__name__}`. Train twice: grow first, then prune."
            )
    if parts := compiled_parts(module):
        raise ValueError(
            "A compiled module keeps its shapes. Found that `torch.compile` was applied to "
            f"`{parts[0] or type(module).__name__}`. Compile it after growth, or not at all."
        )


def grow_on_load(trainer: Any, module: nn.Module) -> RemovableHandle:
    """Grow ``module`` to the size of the checkpoint that it is about to load.

    Lightning loads weights before it gives callbacks their state, so that the plan is looked up in the checkpoint.

    Args:
        trainer: The trainer that loads it.
        module: The module that is trained; averages that callbacks keep of it grow with it.
    """

    def before_load(part: nn.Module, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        # Averages are copies that listen too, with a prefix before their names.
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        plan = plan_in(being_loaded(trainer))
        if plan is not None:
            for each in (module, *averaged_modules(trainer)):
                grow_to(each, plan, own)

    handle: RemovableHandle = module.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call]
    return handle


def grow_to(module: nn.Module, plan: GrowthPlan, state: Mapping[str, Tensor]) -> None:
    """Take those last steps of a plan after which ``module`` has the shapes of a state dict.

    Args:
        module: A module that has grown not at all, by the first steps, or by all.
        plan: How the module of the state dict grew.
        state: A state dict.

    Raises:
        ValueError: If it has grown otherwise, or further.
    """
    wanted = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    for taken in range(len(plan.steps), -1, -1):
        rest = GrowthPlan(plan.module_class, plan.steps[taken:])
        try:
            grown = rest.apply(module) if rest.steps else module
        except (ValueError, AttributeError):  # its steps don't fit
            continue
        shapes = shapes_of(grown)
        if all(shapes.get(name) == shape for name, shape in wanted.items()):
            rest.apply_in_place(module)
            return
    first = next((n for n, shape in shapes_of(module).items() if wanted.get(n) != shape), "")
    raise ValueError(
        "A checkpoint of a training with `NetworkGrowth` loads into a module that has grown no further. Found "
        f"`{first}` of shape {list(shapes_of(module).get(first, ()))} and {list(wanted.get(first, ()))} in the "
        "checkpoint. Give a fresh module, or call `so.load_grown(ModuleClass, checkpoint)`."
    )


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of all that a module saves."""
    return {name: value.shape for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def count_of(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def order_of(trainer: Any, module: nn.Module) -> Order:
    """Return the names of the parameters in the groups of all optimizers, in their order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [[names.get(id(each), "") for each in group["params"]] for group in optimizer.param_groups]
        for optimizer in trainer.optimizers
    ]


def restore_order(trainer: Any, module: nn.Module, order: Order) -> None:
    """Put parameters into the groups and the order that they were in.

    Parameters of new layers joined their groups at the end. When training is resumed, ``configure_optimizers`` meets
    the grown module, and optimizers know what they load by its position alone.

    Args:
        trainer: The trainer, before it restores its optimizers.
        module: The module, grown.
        order: What :func:`order_of` returned.

    Raises:
        ValueError: If optimizers have other parameters now.
    """
    parameters = tensors_of(module)
    now = order_of(trainer, module)
    if [len(groups) for groups in now] != [len(groups) for groups in order] or any(
        sorted(sum(mine, [])) != sorted(sum(theirs, [])) for mine, theirs in zip(now, order, strict=True)
    ):
        raise ValueError(
            "Optimizers of a resumed training must have the parameters that they had. Found others in what "
            "`configure_optimizers` returned for the grown module. Choose parameters by `self.parameters()` or by the "
            "names of parts, which have the new layers among them."
        )
    for optimizer, groups in zip(trainer.optimizers, order, strict=True):
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            group["params"] = [parameters[name] for name in names]


def grown_plan(module: nn.Module, steps: Any, inputs: tuple[Any, ...]) -> GrowthPlan:
    """Return the plan of several steps, one after the other.

    Args:
        module: The module; left as it is.
        steps: Steps of growth.
        inputs: The arguments of its ``forward``.
    """
    first, *others = steps
    plan: GrowthPlan = first.plan(module, inputs)
    grown = copy.deepcopy(module)
    plan.apply_in_place(grown)
    for step in others:
        more: GrowthPlan = step.plan(grown, inputs)
        more.apply_in_place(grown)
        plan = plan.then(more)
    return plan
