"""Growth: wider and deeper networks that go on where the small one was."""

from lightning_structopt.growth.callback import NetworkGrowth
from lightning_structopt.growth.loading import load_grown
from lightning_structopt.growth.net2net import deepen, widen
from lightning_structopt.growth.plan import GrowthPlan
from lightning_structopt.growth.plateau import Plateau
from lightning_structopt.growth.steps import Deepen, GrowthStep, Widen

__all__ = [
    "Deepen",
    "GrowthPlan",
    "GrowthStep",
    "NetworkGrowth",
    "Plateau",
    "Widen",
    "deepen",
    "load_grown",
    "widen",
]
