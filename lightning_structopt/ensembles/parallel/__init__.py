"""Members that all answer."""

from lightning_structopt.ensembles.parallel.module import ParallelEnsemble

__all__ = ["ParallelEnsemble"]
