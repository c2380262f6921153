"""Regularization: penalties that shrink weights while they train, to exact zeros where they can."""

from lightning_structopt.regularization.callback import SparsityPenalty
from lightning_structopt.regularization.penalties import L1, L2, GroupLasso, Penalty

__all__ = ["L1", "L2", "GroupLasso", "Penalty", "SparsityPenalty"]
