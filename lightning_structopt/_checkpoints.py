"""Reading checkpoints that may be cut off, damaged or hostile."""

from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what is in a file of tensors and plain data; reading it runs no code.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever unpickling raises on a file that is something else
        raise ValueError(
            "A checkpoint must be a file of tensors and plain data, so that loading it runs no code. Found "
            f"{str(path)!r}, which isn't. Give a checkpoint of Lightning, or a state dict saved by `torch.save`."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(
            f"A checkpoint must hold a state dict. Found a `{type(found).__name__}` in {str(path)!r}."
        )
    return found


def state_dict_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the state dict in a checkpoint of Lightning.

    Args:
        checkpoint: What :func:`read_checkpoint` returned.
        path: Where it was, for the message.

    Raises:
        ValueError: If there is none.
    """
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise ValueError(
            f"A checkpoint of Lightning must hold a `state_dict`. Found none in {str(path)!r}. Give one that a Trainer "
            "saved."
        )
    return state
