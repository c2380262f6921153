"""A module as it can be shrunk: its graph with labels, and its groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_structopt._checks import require_type
from lightning_structopt.shrinking.groups import ChannelGroup, Groups, find_groups
from lightning_structopt.shrinking.plan import as_tuple
from lightning_structopt.shrinking.tracing import Trace, trace


@dataclass(frozen=True, eq=False)
class Structure:
    """A module as it can be shrunk.

    Args:
        module: The module.
        inputs: The arguments of its ``forward``.
        traced: Its graph with labels.
        found: Its groups.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    traced: Trace
    found: Groups

    def kept_without(self, dropped: Tensor) -> Tensor:
        """Return for each label whether it is kept when these classes are gone."""
        classes = torch.ones(self.traced.space.size, dtype=torch.bool)
        classes[dropped] = False
        return classes[self.found.classes]

    def groups(self, include_normalized: bool) -> list[ChannelGroup]:
        """Return the groups to choose from."""
        return [group for group in self.found.groups if include_normalized or not group.normalized]


def structure_of(module: nn.Module, example_input: Any, exclude: Sequence[str] = ()) -> Structure:
    """Trace a module and find what can go together.

    Args:
        module: The module; left as it is.
        example_input: What its ``forward`` takes, a tuple for several.
        exclude: Globs on names of parameters that keep their shapes.

    Raises:
        TypeError: If ``module`` is not a module.
        ValueError: If it can't be traced, or a glob matches nothing.
    """
    require_type("module", module, nn.Module)
    inputs = as_tuple(example_input)
    traces = [trace(module, inputs)]
    if traces[0].unused.numel():  # heads that run in training only
        traces.append(trace(module, inputs, training=True))
    return Structure(module, inputs, traces[0], find_groups(traces, exclude))
