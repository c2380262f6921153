"""What a student is told: losses on logits, tokens, features and relations, one file a kind."""

from lightning_structopt.distillation.losses.classes import DIST, DKD
from lightning_structopt.distillation.losses.contrastive import ContrastiveRepresentation
from lightning_structopt.distillation.losses.features import (
    AttentionTransfer,
    CosineFeature,
    FeatureMSE,
    Hint,
)
from lightning_structopt.distillation.losses.logits import (
    DistillationLoss,
    JensenShannon,
    LogitMSE,
    ReverseKL,
    SoftTarget,
)
from lightning_structopt.distillation.losses.relations import RKD
from lightning_structopt.distillation.losses.tokens import TokenKL

__all__ = [
    "DIST",
    "DKD",
    "RKD",
    "AttentionTransfer",
    "ContrastiveRepresentation",
    "CosineFeature",
    "DistillationLoss",
    "FeatureMSE",
    "Hint",
    "JensenShannon",
    "LogitMSE",
    "ReverseKL",
    "SoftTarget",
    "TokenKL",
]
