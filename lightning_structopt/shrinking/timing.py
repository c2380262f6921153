"""How long smaller modules take, by making and timing them."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt._devices import device_of
from lightning_structopt.profiling.latency import latency
from lightning_structopt.shrinking.costs import Cost
from lightning_structopt.shrinking.graph_form import smaller_graph
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.trial import Trial, kept_indices

_SECONDS = 0.2
_TOLERANCE = 0.1


def milliseconds(structure: Structure) -> Cost:
    """Return what times a module of which only some labels are kept, once for each shape that it has.

    Args:
        structure: The module.
    """
    known: dict[tuple[Any, ...], float] = {}

    def cost(kept: Tensor) -> float:
        lists = kept_indices(structure.traced, kept)
        shape = tuple(
            (name, dim, len(indices)) for name, dims in lists.items() for dim, indices in dims.items()
        )
        if shape not in known:
            known[shape] = time_of(_smaller(structure, kept, lists), structure.inputs)
        return known[shape]

    return cost


def time_of(module: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return how long a forward pass of ``module`` takes, in milliseconds: the fastest quarter, as others disturb.

    Random numbers that it draws are drawn again afterwards.
    """
    device = device_of(module)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return latency(module, inputs, seconds=_SECONDS).quartiles_ms[0]


def _smaller(structure: Structure, kept: Tensor, lists: dict[str, dict[int, list[int]]]) -> nn.Module:
    trial = Trial(structure, None, lists, changes_outputs=True)
    edits = trial.choose(kept)
    if edits is None:
        return smaller_graph(structure.module, structure.inputs, lists)
    return trial.small(edits)[0]


def warn_if_missed(keep: float, before_ms: float, after_ms: float) -> None:
    """Warn if a module became not as fast as it should, or faster.

    Args:
        keep: The fraction of the time that should be left.
        before_ms: What it took before, in milliseconds.
        after_ms: What it takes now.
    """
    if abs(after_ms / before_ms - keep) > _TOLERANCE:
        warnings.warn(
            f"`Latency({keep})` was missed: a pass took {before_ms:.3g} ms and now takes {after_ms:.3g} ms, "
            f"{after_ms / before_ms:.2f} of that. Give a larger example input, or a machine with nothing else to do.",
            stacklevel=4,
        )
