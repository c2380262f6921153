"""Structural optimization for PyTorch Lightning: make a model smaller, faster or better."""

from lightning_structopt.lr_decay import LRDecay
from lightning_structopt.pruning import (
    Criterion,
    CubicRamp,
    GeometricRamp,
    IterativePruning,
    LinearRamp,
    Magnitude,
    OneCycleRamp,
    OneShotRamp,
    Pattern,
    Ramp,
    Unstructured,
    kth_smallest,
    prune,
)
from lightning_structopt.schedules import (
    Constant,
    Cosine,
    Exponential,
    Linear,
    MultiStep,
    Polynomial,
    Schedule,
    Step,
    Warmup,
)

__version__ = "0.1.0.dev0"

__all__ = [
    "Constant",
    "Cosine",
    "Criterion",
    "CubicRamp",
    "Exponential",
    "GeometricRamp",
    "IterativePruning",
    "LRDecay",
    "Linear",
    "LinearRamp",
    "Magnitude",
    "MultiStep",
    "OneCycleRamp",
    "OneShotRamp",
    "Pattern",
    "Polynomial",
    "Ramp",
    "Schedule",
    "Step",
    "Unstructured",
    "Warmup",
    "kth_smallest",
    "prune",
]
