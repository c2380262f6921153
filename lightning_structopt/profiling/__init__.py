"""What a module is worth and what it costs: quality, parameters, operations, bytes, memory and time."""

from lightning_structopt.profiling.callback import CostMonitor
from lightning_structopt.profiling.comparison import compare
from lightning_structopt.profiling.latency import Latency, latency
from lightning_structopt.profiling.profiler import LayerCost, Profile, profile
from lightning_structopt.profiling.report import ComparisonReport, Entry
from lightning_structopt.profiling.training_cost import TrainingCost

__all__ = [
    "ComparisonReport",
    "CostMonitor",
    "Entry",
    "Latency",
    "LayerCost",
    "Profile",
    "TrainingCost",
    "compare",
    "latency",
    "profile",
]
