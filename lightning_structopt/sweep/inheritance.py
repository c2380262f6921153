"""Children: modules that a mutation makes of their parents', with weights and with what optimizers remember."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_structopt._files import as_a_whole
from lightning_structopt.profiling.inputs import inputs_of
from lightning_structopt.sweep.heirs import Mutation

_RESUME = "ExactResume"  # the only callback whose state children inherit: others hold what fits the parent
_AVERAGES = ("current_model_state", "averaging_state")  # of Lightning's averaging callbacks
Names = list[list[list[str]]]  # of each optimizer and group, those of its parameters


class BirthError(Exception):
    """A mutation can't be made of the parent."""


class Birth(Callback):
    """Makes a module that has its parent's architecture a child, which goes on from its parent's checkpoint.

    Callbacks begin anew in a child; loops, learning rates, random states and optimizers go on.

    Args:
        module: A new module of the parent's architecture; it becomes the child.
        mutation: What changes.
        example: What its ``forward`` takes, a tuple for several.
        checkpoint: The parent's.
        change: Where to keep what was done.
        folder: Where the checkpoint that it starts from lies for a moment; the driver clears it up after a kill.

    Raises:
        BirthError: If that can't be done.
    """

    def __init__(
        self,
        module: nn.Module,
        mutation: Mutation,
        example: Any,
        checkpoint: Path,
        change: Path,
        folder: Path,
    ) -> None:
        if checkpoint.is_dir():
            raise BirthError(
                "children need a parent's checkpoint in one file. Found one in parts, of a sharded training"
            )
        # Not only weights, as when a trial resumes: this very sweep has written it.
        found = torch.load(checkpoint, map_location="cpu", weights_only=False)
        inherited = {name: value for name, value in found.items() if name not in _AVERAGES}
        inherited["callbacks"] = {_RESUME: found["callbacks"][_RESUME]}
        names: Names = found["callbacks"][_RESUME]["parameters"]
        module.load_state_dict(found["state_dict"])
        try:
            made = mutation.plan(module, example)
            stand_ins = [
                _stand_in(module, *each) for each in zip(names, found["optimizer_states"], strict=True)
            ]
            made.apply_in_place(module, stand_ins)
        except Exception as error:  # whatever a forward pass raises that is meant for other arguments
            raise BirthError(f"its parent can't change so: {' '.join(str(error).split())}") from error
        with as_a_whole(change) as beside:
            made.save(beside)
        self._states = [_by_name(module, stand_in) for stand_in in stand_ins]
        inherited["state_dict"] = module.state_dict()
        self.file = folder / f"epoch-birth-{os.environ.get('LOCAL_RANK', 0)}.part"  # each rank has its own
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(inherited, self.file)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._checkpoint = checkpoint

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Optimizers are there and not yet restored. They know what they load by its place alone, and in the child
        # new parameters lie between the others.
        names, old = names_of(trainer.optimizers, pl_module), self._checkpoint["optimizer_states"]
        if [len(groups) for groups in names] != [len(state["param_groups"]) for state in old]:
            raise BirthError(
                "`configure_optimizers` must give a child as many optimizers and groups as its parent has"
            )
        self._checkpoint["optimizer_states"] = [
            _packed(*each) for each in zip(names, old, self._states, strict=True)
        ]
        self.file.unlink(missing_ok=True)


def names_of(optimizers: Sequence[Optimizer], module: nn.Module) -> Names:
    """Return the names of the parameters that optimizers move, by their groups; empty for those of nobody."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [
        [[names.get(id(each), "") for each in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def example_of(module: nn.Module, load_data: Any) -> Any:
    """Return what a module's ``forward`` takes: its own example, or the inputs of a batch.

    Args:
        module: A LightningModule.
        load_data: Returns a copy of the data that nobody else uses.

    Raises:
        BirthError: If the module makes its layers too late, or there is no batch.
    """
    if is_overridden("configure_model", module):
        raise BirthError("children need layers that are made in `__init__`. Found a `configure_model`")
    example = getattr(module, "example_input_array", None)
    if example is None:
        try:
            with isolate_rng():
                example = inputs_of(_first_batch(load_data()[0]))
        except Exception as error:  # whatever the user's data raise outside of a Trainer
            raise BirthError(
                f"children need an example of what `forward` takes. Found none in the data: {error!r}. Set "
                "`example_input_array`"
            ) from error
    return example


def _first_batch(source: Any) -> Any:
    if isinstance(source, pl.LightningDataModule):
        source.prepare_data()
        source.setup("fit")
        source = source.train_dataloader()
    return next(iter(tree_leaves(source)[0]))


def _stand_in(module: nn.Module, names: list[list[str]], state: Mapping[str, Any]) -> Optimizer:
    """Return an optimizer that remembers of ``module`` what ``state`` says, to be changed with it."""
    parameters = dict(module.named_parameters())
    optimizer = Optimizer([{"params": [parameters[name] for name in group]} for group in names], {})
    flat = [parameters[name] for group in names for name in group]
    for index, remembered in state["state"].items():
        optimizer.state[flat[index]] = remembered
    return optimizer


def _by_name(module: nn.Module, stand_in: Optimizer) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)]: remembered for parameter, remembered in stand_in.state.items()}


def _packed(names: list[list[str]], old: Mapping[str, Any], remembered: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as torch packs it, for parameters at the places that ``names`` says."""
    flat = [name for group in names for name in group]
    state = {index: remembered[name] for index, name in enumerate(flat) if name in remembered}
    groups, first = [], 0
    for group, before in zip(names, old["param_groups"], strict=True):
        groups.append({**before, "params": list(range(first, first + len(group)))})
        first += len(group)
    return {"state": state, "param_groups": groups}
