"""Pruning: which weights matter least, which go together, how fast they go, and that they stay gone."""

from lightning_structopt.pruning.callback import IterativePruning
from lightning_structopt.pruning.criteria import Criterion, Magnitude, Scores
from lightning_structopt.pruning.distributions import Distribution, ErdosRenyi, PerLayer, Uniform
from lightning_structopt.pruning.one_shot import prune
from lightning_structopt.pruning.patterns import Block, NByM, Neurons, Pattern, Unstructured
from lightning_structopt.pruning.ramps import (
    CubicRamp,
    GeometricRamp,
    LinearRamp,
    OneCycleRamp,
    OneShotRamp,
    Ramp,
)
from lightning_structopt.pruning.rewinding import Rewind, RewindLR, RewindWeights
from lightning_structopt.pruning.sensitivity import Sensitivity, sensitivity
from lightning_structopt.pruning.threshold import kth_smallest

__all__ = [
    "Block",
    "Criterion",
    "CubicRamp",
    "Distribution",
    "ErdosRenyi",
    "GeometricRamp",
    "IterativePruning",
    "LinearRamp",
    "Magnitude",
    "NByM",
    "Neurons",
    "OneCycleRamp",
    "OneShotRamp",
    "Pattern",
    "PerLayer",
    "Ramp",
    "Rewind",
    "RewindLR",
    "RewindWeights",
    "Scores",
    "Sensitivity",
    "Uniform",
    "Unstructured",
    "kth_smallest",
    "prune",
    "sensitivity",
]
