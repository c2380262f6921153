"""Pruning the lowest scores, exactly as many as asked for."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from lightning_structopt.pruning.criteria import Scores
from lightning_structopt.pruning.sharding import WHOLE, Sharding
from lightning_structopt.pruning.threshold import kth_smallest

Masks = dict[str, Tensor]
Count = Callable[[int], int]


def drop_lowest(
    scores: Scores, keep: Mapping[str, Tensor], count_of: Callable[[int], int], sharding: Sharding = WHOLE
) -> Masks:
    """Prune the weights with the lowest scores, ties in order of index.

    Args:
        scores: Importance of every weight.
        keep: The masks so far; what is pruned counts and comes first.
        count_of: From the number of all weights to the number of those that are pruned afterwards.
        sharding: How the weights are spread over ranks.

    Returns:
        The new masks; ``keep`` itself where enough is pruned already.
    """
    counted = {name: mask for name, mask in keep.items() if sharding.counts(name)}
    total = sharding.total(mask.numel() for mask in counted.values())
    kept = sharding.total(_kept(counted))
    count = count_of(total)
    if count <= total - kept:
        return dict(keep)
    ranked = _pruned_first(scores, keep)
    values = [ranked.values[name] if name in counted else ranked.values[name][:0] for name in keep]
    threshold = kth_smallest(values, count, absolute=ranked.power is not None, group=sharding.group)
    above = {name: _compare(torch.gt, ranked, name, threshold) & mask for name, mask in keep.items()}
    gone = total - sharding.total(_kept({name: above[name] for name in counted}))
    return _revive_ties(ranked, keep, above, threshold, gone - count, sharding)


def _pruned_first(scores: Scores, keep: Mapping[str, Tensor]) -> Scores:
    """Let nothing rank below what is pruned already; magnitudes do so by themselves, as those are zero."""
    if scores.power is not None:
        return scores
    return Scores({name: scores.values[name].masked_fill(~mask, -torch.inf) for name, mask in keep.items()})


def _compare(
    relation: Callable[[Tensor, Tensor], Tensor], scores: Scores, name: str, threshold: Tensor
) -> Tensor:
    # Among mixed precisions the threshold has the widest, to which torch would not promote for a single value.
    return relation(scores.ranked(name).to(threshold.dtype), threshold.to(scores.values[name].device))


def _revive_ties(
    scores: Scores,
    keep: Mapping[str, Tensor],
    masks: Masks,
    threshold: Tensor,
    spare: int,
    sharding: Sharding,
) -> Masks:
    """Take back the last ``spare`` weights that tie with the threshold, in order of name, rank and index."""
    masks = {name: mask.contiguous() for name, mask in masks.items()}
    if spare == 0:
        return masks
    ties = {
        name: (mask & _compare(torch.eq, scores, name, threshold)).flatten().nonzero().squeeze(1)
        for name, mask in keep.items()
    }
    everywhere = sharding.gather([len(found) for found in ties.values()])
    for index, name in reversed(list(enumerate(keep))):
        ranks = range(len(everywhere)) if name in sharding.sharded else [sharding.rank]
        for rank in reversed(ranks):
            revived = min(spare, everywhere[rank][index])
            spare -= revived
            if rank == sharding.rank and revived:
                masks[name].view(-1)[ties[name][-revived:]] = True
    return masks


def _kept(masks: Mapping[str, Tensor]) -> Iterator[int]:
    return (int(mask.count_nonzero()) for mask in masks.values())
