"""Knowledge distillation: a student learns from a teacher what labels don't say."""

from lightning_structopt.distillation.cache import CollateWithIds, TeacherCache, WithIds
from lightning_structopt.distillation.losses import (
    DIST,
    DKD,
    RKD,
    AttentionTransfer,
    ContrastiveRepresentation,
    CosineFeature,
    DistillationLoss,
    FeatureMSE,
    Hint,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SoftTarget,
    TokenKL,
)
from lightning_structopt.distillation.module import DistillationModule
from lightning_structopt.distillation.mutual import MutualDistillation
from lightning_structopt.distillation.teachers.committee import Teachers
from lightning_structopt.distillation.teachers.following import EMATeacher
from lightning_structopt.distillation.teachers.generations import born_again

__all__ = [
    "DIST",
    "DKD",
    "RKD",
    "AttentionTransfer",
    "CollateWithIds",
    "ContrastiveRepresentation",
    "CosineFeature",
    "DistillationLoss",
    "DistillationModule",
    "EMATeacher",
    "FeatureMSE",
    "Hint",
    "JensenShannon",
    "LogitMSE",
    "MutualDistillation",
    "ReverseKL",
    "SoftTarget",
    "TeacherCache",
    "Teachers",
    "TokenKL",
    "WithIds",
    "born_again",
]
