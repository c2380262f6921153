"""Pruning: which weights matter least, which go together, how fast they go, and that they stay gone."""

from lightning_structopt.pruning.calibration import Calibration
from lightning_structopt.pruning.callback import IterativePruning
from lightning_structopt.pruning.criteria import Criterion, Evidence, Magnitude, Scores
from lightning_structopt.pruning.curvature import HessianDiagonal
from lightning_structopt.pruning.distributions import Distribution, ErdosRenyi, PerLayer, Uniform
from lightning_structopt.pruning.filter_criteria import BatchNormScale, GeometricMedian
from lightning_structopt.pruning.gradient_criteria import GradientSquared, Movement, Taylor
from lightning_structopt.pruning.jacobian import JacobianImportance
from lightning_structopt.pruning.neuron_importance import neuron_importance
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
from lightning_structopt.pruning.regrowth import Regrow, RigL
from lightning_structopt.pruning.rewinding import Rewind, RewindLR, RewindWeights
from lightning_structopt.pruning.semi_structured import SemiStructuredReport, to_semi_structured
from lightning_structopt.pruning.sensitivity import Sensitivity, sensitivity
from lightning_structopt.pruning.threshold import kth_smallest
from lightning_structopt.pruning.wanda import Wanda
from lightning_structopt.pruning.weight_criteria import LAMP, Random

__all__ = [
    "LAMP",
    "BatchNormScale",
    "Block",
    "Calibration",
    "Criterion",
    "CubicRamp",
    "Distribution",
    "ErdosRenyi",
    "Evidence",
    "GeometricMedian",
    "GeometricRamp",
    "GradientSquared",
    "HessianDiagonal",
    "IterativePruning",
    "JacobianImportance",
    "LinearRamp",
    "Magnitude",
    "Movement",
    "NByM",
    "Neurons",
    "OneCycleRamp",
    "OneShotRamp",
    "Pattern",
    "PerLayer",
    "Ramp",
    "Random",
    "Regrow",
    "Rewind",
    "RewindLR",
    "RewindWeights",
    "RigL",
    "Scores",
    "SemiStructuredReport",
    "Sensitivity",
    "Taylor",
    "Uniform",
    "Unstructured",
    "Wanda",
    "kth_smallest",
    "neuron_importance",
    "prune",
    "sensitivity",
    "to_semi_structured",
]
