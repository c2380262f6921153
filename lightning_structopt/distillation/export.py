"""Writing a student to a file that its own class reads."""

import io
import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_structopt._files import as_a_whole


def export(student: Any, path: str | Path) -> None:
    """Write a LightningModule alone, as ``load_from_checkpoint`` and ``ckpt_path`` take it; all ranks call it together.

    Args:
        student: The module.
        path: Where to.

    Raises:
        ValueError: If its hyperparameters, or what it adds to checkpoints, are not plain data.
    """
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": version("lightning"),
        "state_dict": whole_on_cpu(student.state_dict()),
    }
    if student.hparams:
        checkpoint[student.CHECKPOINT_HYPER_PARAMS_KEY] = dict(student.hparams)
        if name := getattr(student, "_hparams_name", None):
            checkpoint[student.CHECKPOINT_HYPER_PARAMS_NAME] = name
    student.on_save_checkpoint(checkpoint)
    if student.global_rank == 0:
        write_safely(checkpoint, path)


def whole_on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with its tensors on the CPU, sharded ones put together; all ranks call it together."""
    return {name: _whole(value) for name, value in state.items()}


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, Tensor) else value


def write_safely(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint``, which weights-only loading must be able to read, as a whole or not at all.

    Args:
        checkpoint: What to write, with its weights under ``state_dict``.
        path: Where to.

    Raises:
        ValueError: If it holds something that is not plain data.
    """
    plain, weights = {k: v for k, v in checkpoint.items() if k != "state_dict"}, checkpoint["state_dict"]
    for name, value in {**plain, **weights}.items():
        if not isinstance(value, Tensor):
            _require_plain(name, value)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with as_a_whole(path) as beside:
        torch.save(checkpoint, beside)


def _require_plain(name: str, value: Any) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        raise ValueError(
            f"An exported student must load with `weights_only=True`, so it is tensors and plain data. Found {value!r} "
            f'under "{name}". Leave it out of `save_hyperparameters`, or of what `on_save_checkpoint` adds.'
        ) from error
