"""Blocks and nets to choose from: with fewer parameters, with more depth, and with work that adapts to the input."""

from lightning_structopt.blocks.adaptive import AdaptiveBlock, dense
from lightning_structopt.blocks.auxiliary import auxiliary_loss
from lightning_structopt.blocks.callback import ActivationCheck, AdaptiveReport
from lightning_structopt.blocks.capsules import CapsuleRouting
from lightning_structopt.blocks.computation import AdaptiveComputationUnit, Pondered
from lightning_structopt.blocks.convnet import ConvNet
from lightning_structopt.blocks.convolutionalize import PooledLinear, convolutionalize
from lightning_structopt.blocks.early_exit import EarlyExit
from lightning_structopt.blocks.gated import GatedBlock
from lightning_structopt.blocks.gates import Annealed, Gate, GateBudget, Relaxation, StraightThrough
from lightning_structopt.blocks.initialization import (
    LSUV,
    Initialization,
    Kaiming,
    Orthogonal,
    Xavier,
    initialize,
)
from lightning_structopt.blocks.mlp import MLP
from lightning_structopt.blocks.residual import PaddedShortcut, ResidualBlock, projection
from lightning_structopt.blocks.residual_net import ResidualNet
from lightning_structopt.blocks.routing import RoutedBlock

__all__ = [
    "LSUV",
    "MLP",
    "ActivationCheck",
    "AdaptiveBlock",
    "AdaptiveComputationUnit",
    "AdaptiveReport",
    "Annealed",
    "CapsuleRouting",
    "ConvNet",
    "EarlyExit",
    "Gate",
    "GateBudget",
    "GatedBlock",
    "Initialization",
    "Kaiming",
    "Orthogonal",
    "PaddedShortcut",
    "Pondered",
    "PooledLinear",
    "Relaxation",
    "ResidualBlock",
    "ResidualNet",
    "RoutedBlock",
    "StraightThrough",
    "Xavier",
    "auxiliary_loss",
    "convolutionalize",
    "dense",
    "initialize",
    "projection",
]
