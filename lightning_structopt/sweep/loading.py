"""From a checkpoint back to a trained module."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_structopt._checkpoints import read_checkpoint, state_dict_of
from lightning_structopt.sweep.candidates import Candidate
from lightning_structopt.sweep.heirs import Mutation
from lightning_structopt.sweep.trial import build


def load_candidate(
    name: str,
    candidate: Candidate,
    parameters: Mapping[str, Any],
    checkpoint: Path,
    changes: Sequence[tuple[Mutation, Path]] = (),
) -> Any:
    """Build the module of ``candidate`` and load the weights of ``checkpoint``, on the CPU, in evaluation mode.

    A child's ``changes`` are made before. The global random state is left as it was. Nothing in the checkpoint is run.
    """
    with isolate_rng():
        module = build(name, candidate, parameters, changes)
        if is_overridden("configure_model", module):
            module.configure_model()
    module.load_state_dict(_state_dict(checkpoint))
    return module.eval()


def _state_dict(checkpoint: Path) -> Any:
    if checkpoint.is_file():
        return state_dict_of(read_checkpoint(checkpoint), checkpoint)
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(checkpoint)["state_dict"]
