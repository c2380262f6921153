"""A teacher's outputs on disk, by sample."""

from lightning_structopt.distillation.cache.sample_ids import CollateWithIds, Identified, WithIds
from lightning_structopt.distillation.cache.teacher_cache import TeacherCache

__all__ = ["CollateWithIds", "Identified", "TeacherCache", "WithIds"]
