"""Members put together by something that is trained: stacking and gating."""

from lightning_structopt.ensembles.mixed.combiners import GatingNetwork
from lightning_structopt.ensembles.mixed.module import MixedEnsemble
from lightning_structopt.ensembles.mixed.out_of_fold import Held, OutOfFold, gather_out_of_fold, out_of_fold

__all__ = ["GatingNetwork", "Held", "MixedEnsemble", "OutOfFold", "gather_out_of_fold", "out_of_fold"]
