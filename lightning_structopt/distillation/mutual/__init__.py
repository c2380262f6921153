"""Students that teach each other."""

from lightning_structopt.distillation.mutual.module import MutualDistillation

__all__ = ["MutualDistillation"]
