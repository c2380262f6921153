"""Knowledge distillation: a student learns from a teacher what labels don't say."""

from lightning_structopt.distillation.committee import Teachers
from lightning_structopt.distillation.following import EMATeacher
from lightning_structopt.distillation.module import DistillationModule

__all__ = ["DistillationModule", "EMATeacher", "Teachers"]
