"""Knowledge distillation: a student learns from a teacher what labels don't say."""

from lightning_structopt.distillation.cache import TeacherCache
from lightning_structopt.distillation.class_losses import DIST, DKD
from lightning_structopt.distillation.committee import Teachers
from lightning_structopt.distillation.contrastive import ContrastiveRepresentation
from lightning_structopt.distillation.feature_losses import AttentionTransfer, CosineFeature, FeatureMSE, Hint
from lightning_structopt.distillation.following import EMATeacher
from lightning_structopt.distillation.generations import born_again
from lightning_structopt.distillation.losses import (
    DistillationLoss,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SoftTarget,
)
from lightning_structopt.distillation.module import DistillationModule
from lightning_structopt.distillation.mutual import MutualDistillation
from lightning_structopt.distillation.relational_losses import RKD
from lightning_structopt.distillation.sample_ids import CollateWithIds, WithIds
from lightning_structopt.distillation.token_losses import TokenKL

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
