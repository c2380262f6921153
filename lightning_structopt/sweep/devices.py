"""How many devices a trial takes, and which are its own, read from the Trainer's arguments."""

import os
from collections.abc import Mapping
from typing import Any

import torch

# They pickle the Trainer with its callbacks, which hold a trial's line to the driver.
_SPAWNING = ("ddp_spawn", "ddp_fork", "ddp_notebook")
_GPU = ("gpu", "cuda")


def count_devices(trainer: Mapping[str, Any], workers: int = 1) -> int:
    """Return how many processes or devices a Trainer of these arguments takes, on its share of this machine."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if isinstance(devices, str) and devices not in {"auto", "-1"}:
        return len(devices.split(",")) if "," in devices else int(devices)
    if devices in {"auto", "-1", -1}:
        return max(1, torch.cuda.device_count() // workers) if _on_gpus(trainer) else 1
    return int(devices)


def require_devices(trainer: Mapping[str, Any], workers: int) -> None:
    """Raise unless the strategy fits and there are as many GPUs as ``workers`` trials take.

    CPU "devices" are processes: there are enough.

    Raises:
        ValueError: If it doesn't, or there are too few.
    """
    if str(trainer.get("strategy", "")).startswith(_SPAWNING):
        raise ValueError(
            "`trainer` must name a strategy that starts its ranks as programs. Found "
            f"`strategy={trainer['strategy']!r}`. Take 'ddp': trials are processes of their own, from notebooks too."
        )
    asked, there = count_devices(trainer), torch.cuda.device_count()
    if trainer.get("accelerator", "auto") in _GPU and there == 0:
        raise ValueError(
            f"`trainer` must ask for devices that are there. Found `accelerator={trainer['accelerator']!r}` and no GPU."
        )
    if (
        _on_gpus(trainer)
        and trainer.get("devices", "auto") not in {"auto", -1, "-1"}
        and asked * workers > there
    ):
        raise ValueError(
            f"`trainer` must ask for devices that are there. Found {workers} workers of {asked} GPUs each, and "
            f"{there} GPUs. Take fewer workers or devices."
        )


def gpus_of_slot(slot: int, workers: int, trainer: Mapping[str, Any]) -> str | None:
    """Return the GPUs of a slot, for ``CUDA_VISIBLE_DEVICES``; None where there are none to share out."""
    if not _on_gpus(trainer) or isinstance(trainer.get("devices"), (list, tuple)):
        return None
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    share = max(1, len(names) // workers)
    return ",".join(names[(slot * share) % len(names) :][:share])


def _on_gpus(trainer: Mapping[str, Any]) -> bool:
    accelerator = trainer.get("accelerator", "auto")
    return accelerator in _GPU or (accelerator == "auto" and torch.cuda.device_count() > 0)
