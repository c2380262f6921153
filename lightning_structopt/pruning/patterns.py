"""Which weights go together, and how the sparsity is shared out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_structopt._checks import require_choice
from lightning_structopt.pruning.criteria import Scores
from lightning_structopt.pruning.threshold import kth_smallest

Masks = dict[str, Tensor]


class Pattern(ABC):
    """A rule that turns scores into masks of a given sparsity."""

    @abstractmethod
    def choose(self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float) -> Masks:
        """Choose what to keep.

        What is pruned stays pruned: nothing outside ``keep`` is kept.

        Args:
            scores: Importance of every weight.
            keep: The masks so far, by parameter name; True where a weight is kept.
            sparsity: Fraction of weights to be zero afterwards, in [0, 1).

        Returns:
            The new masks, by parameter name.
        """


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight for itself.

    Args:
        scope: ``"global"`` compares the weights of all layers with each other: exactly
            ``round(sparsity * count)`` of them go, and layers end with different sparsity. ``"layer"`` prunes
            each layer to the same sparsity, each exact to one weight.

    Raises:
        ValueError: If ``scope`` is something else.
    """

    scope: Literal["global", "layer"] = "global"

    def __post_init__(self) -> None:
        require_choice("scope", self.scope, ("global", "layer"))

    @override
    def choose(self, scores: Scores, keep: Mapping[str, Tensor], sparsity: float) -> Masks:
        groups = [list(keep)] if self.scope == "global" else [[name] for name in keep]
        masks: Masks = {}
        for names in groups:
            group = {name: keep[name] for name in names}
            masks |= drop_lowest(scores, group, round(sparsity * sum(m.numel() for m in group.values())))
        return masks


def drop_lowest(scores: Scores, keep: Mapping[str, Tensor], count: int) -> Masks:
    """Prune until ``count`` weights are gone, those with the lowest scores first, ties in order of index.

    Args:
        scores: Importance of every weight.
        keep: The masks so far; what is pruned counts towards ``count`` and comes first.
        count: Number of weights that are pruned afterwards.

    Returns:
        The new masks; ``keep`` itself where enough is pruned already.
    """
    total = sum(mask.numel() for mask in keep.values())
    if count <= total - _kept(keep):
        return dict(keep)
    ranked = _pruned_first(scores, keep)
    values = [ranked.values[name] for name in keep]
    threshold = kth_smallest(values, count, absolute=ranked.power is not None)
    masks = {name: (mask & (ranked.ranked(name) > threshold)).contiguous() for name, mask in keep.items()}
    spare = _kept(keep) - _kept(masks) - (count - (total - _kept(keep)))
    _revive_ties(ranked, keep, masks, threshold, spare)
    return masks


def _pruned_first(scores: Scores, keep: Mapping[str, Tensor]) -> Scores:
    """Let nothing rank below what is pruned already; magnitudes do so by themselves, as those are zero."""
    if scores.power is not None:
        return scores
    return Scores({name: scores.values[name].masked_fill(~mask, -torch.inf) for name, mask in keep.items()})


def _revive_ties(
    scores: Scores, keep: Mapping[str, Tensor], masks: Masks, threshold: Tensor, spare: int
) -> None:
    """Take back the last ``spare`` weights that tie with the threshold."""
    for name in reversed(list(keep)):
        if spare == 0:
            return
        ties = (keep[name] & (scores.ranked(name) == threshold)).flatten().nonzero().squeeze(1)[-spare:]
        masks[name].view(-1)[ties] = True
        spare -= len(ties)


def _kept(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.count_nonzero()) for mask in masks.values())
