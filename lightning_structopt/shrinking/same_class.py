"""Leaving alone what can't get smaller as a module of the same class."""

import torch
from torch import Tensor, fx

from lightning_structopt.shrinking.groups import ChannelGroup
from lightning_structopt.shrinking.labels import Layer
from lightning_structopt.shrinking.literals import changed_literals
from lightning_structopt.shrinking.operators import parts_of
from lightning_structopt.shrinking.structure import Structure
from lightning_structopt.shrinking.trial import Trial, kept_indices


def without_hard_coded(structure: Structure, groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups whose sizes no code has as plain numbers.

    Half of each group is removed. Where the smaller module does not run, whatever the attributes, the groups that
    change a size in the part that failed, or in another part of its class, are left out.

    Args:
        structure: The module.
        groups: The groups to choose from.
    """
    while groups:
        half = torch.cat([group.classes[(group.size + 1) // 2 :] for group in groups])
        kept = structure.kept_without(half)
        trial = Trial(structure, None, kept_indices(structure.traced, kept), changes_outputs=True)
        if trial.choose(kept) is not None:
            break
        touched = _touched(structure, kept, trial.failed)
        rest = [group for group in groups if not bool(torch.isin(group.classes, touched).any())]
        if len(rest) == len(groups):
            break  # which nothing explains: the graph is what is left
        groups = rest
    return groups


def _touched(structure: Structure, kept: Tensor, failed: list[str]) -> Tensor:
    """Return the classes of labels that change a size in the part that failed, or in its like."""
    literals = changed_literals(structure.traced, kept)
    kinds = {literal.place: type(structure.module.get_submodule(literal.place)) for literal in literals}
    kind = next((kinds[place] for place in failed if place in kinds), None)
    labels = [
        layer.labels.reshape(-1)
        for literal in literals
        if kind is None or kinds[literal.place] is kind
        for node in (literal.node, *literal.node.all_input_nodes)
        for layer in _layers(structure, node)
    ]
    found = structure.found.classes[torch.cat([*labels, torch.empty(0, dtype=torch.int64)])]
    return found[found != 0]


def _layers(structure: Structure, node: fx.Node) -> list[Layer]:
    return [layer for part in parts_of(structure.traced.values[node]) for layer in part.layers]
