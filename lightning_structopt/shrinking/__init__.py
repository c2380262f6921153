"""Physical removal: channels, heads and neurons, gone for real."""

from lightning_structopt.shrinking.callback import ChannelPruning
from lightning_structopt.shrinking.channels import channel_report, prune_channels
from lightning_structopt.shrinking.loading import load_shrunk
from lightning_structopt.shrinking.plan import ShrinkPlan
from lightning_structopt.shrinking.report import ShrinkReport
from lightning_structopt.shrinking.shrink import shrink, shrink_report
from lightning_structopt.shrinking.targets import ChannelRatio, FLOPs, Latency, MaxBytes, Parameters, Target

__all__ = [
    "ChannelPruning",
    "ChannelRatio",
    "FLOPs",
    "Latency",
    "MaxBytes",
    "Parameters",
    "ShrinkPlan",
    "ShrinkReport",
    "Target",
    "channel_report",
    "load_shrunk",
    "prune_channels",
    "shrink",
    "shrink_report",
]
