"""What a module costs: parameters, operations, bytes, memory and time."""

from lightning_structopt.profiling.latency import Latency, latency
from lightning_structopt.profiling.profiler import LayerCost, Profile, profile

__all__ = ["LayerCost", "Latency", "Profile", "latency", "profile"]
