"""Samples dealt to folds: sweeps that train on folds and ensembles that read them must deal alike."""

import torch


def deal(samples: int, folds: int, seed: int) -> list[list[int]]:
    """Return the indices of each fold; sizes differ by one at most.

    Example:
        >>> sorted(len(fold) for fold in deal(samples=8, folds=3, seed=0))
        [2, 3, 3]
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[fold::folds] for fold in range(folds)]
