"""Checkpoints that commands read and write, with the plan of what was made smaller."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import __version__ as lightning_version
from torch import nn

from lightning_structopt._checkpoints import read_checkpoint
from lightning_structopt._files import as_a_whole
from lightning_structopt.profiling import TrainingCost
from lightning_structopt.shrinking import ChannelPruning, ShrinkReport
from lightning_structopt.shrinking.loading import OWNER, plan_in, whole_again


def loaded(module: nn.Module, checkpoint: Path | None) -> nn.Module:
    """Return ``module`` with the weights of ``checkpoint``, smaller if those are.

    Raises:
        ValueError: If it is no checkpoint, or not of this module.
    """
    return module if checkpoint is None else fitted(module, read_checkpoint(checkpoint), checkpoint)


def fitted(module: nn.Module, content: dict[str, Any], checkpoint: Path) -> nn.Module:
    """Do what :func:`loaded` does, with the ``content`` that was read of ``checkpoint``.

    Raises:
        ValueError: If it is not of this module.
    """
    state, plan = content, None
    if "state_dict" in state:
        plan, state = plan_in(state), state["state_dict"]
    try:
        module.load_state_dict(state if plan is None else whole_again(state, plan))
    except RuntimeError as error:
        raise ValueError(
            f"A checkpoint must fit its model. Found that {str(checkpoint)!r} doesn't fit "
            f"`{type(module).__name__}`: {error}"
        ) from error
    return module if plan is None else plan.apply(module)


def small_checkpoint(report: ShrinkReport, source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint for ``so.load_shrunk``: hyperparameters of ``source``, the small weights and their plan."""
    known = {
        name: value
        for name, value in source.items()
        if name in {"hyper_parameters", "hparams_name", "epoch", "global_step"}
    }
    return {
        "pytorch-lightning_version": lightning_version,
        **known,
        "state_dict": report.module.state_dict(),
        "callbacks": {OWNER: {"plan": report.plan.as_data()}},
    }


def add_plan(checkpoint: Path, callbacks: Iterable[Any]) -> None:
    """Write the plan of a ``ChannelPruning`` among ``callbacks`` into ``checkpoint``, for ``so.load_shrunk``."""
    for callback in callbacks:
        if isinstance(callback, ChannelPruning) and callback.plan is not None:
            plan = {"callbacks": {OWNER: {"plan": callback.plan.as_data()}}}
            content = read_checkpoint(checkpoint)
            with as_a_whole(checkpoint) as beside:
                torch.save(content | plan, beside)


def training_cost(content: Mapping[str, Any]) -> TrainingCost | None:
    """Return what training took by the ``CostMonitor`` of the run that saved this checkpoint; None if it had none.

    Raises:
        ValueError: If what it holds is no such cost.
    """
    state = content.get("callbacks", {}).get("CostMonitor")
    if state is None:
        return None
    try:
        return TrainingCost(**state)
    except TypeError as error:
        raise ValueError(f"A `CostMonitor` in a checkpoint must hold a cost. Found {state!r}.") from error
