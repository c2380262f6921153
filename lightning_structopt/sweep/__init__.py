"""Architecture sweeps: many candidates, each in a process of its own, the best of them trained on."""

from lightning_structopt.profiling.bounds import Constraint, MaxBytes, MaxFLOPs, MaxLatency, MaxParameters
from lightning_structopt.sweep.architecture import AllFailedError, ArchitectureSweep
from lightning_structopt.sweep.brackets import AsynchronousHalving, Hyperband
from lightning_structopt.sweep.budget import Budget, FixedRounds, SuccessiveHalving
from lightning_structopt.sweep.candidates import Candidate
from lightning_structopt.sweep.cluster import RayCluster
from lightning_structopt.sweep.evolution import RegularizedEvolution
from lightning_structopt.sweep.executors import Executor, InProcess, LocalProcesses
from lightning_structopt.sweep.members import MemberFailedError, train_members
from lightning_structopt.sweep.parts import Bootstrap, DataPart, Fold
from lightning_structopt.sweep.result import CandidateResult, SweepResult
from lightning_structopt.sweep.space import SearchSpace

__all__ = [
    "AllFailedError",
    "ArchitectureSweep",
    "AsynchronousHalving",
    "Bootstrap",
    "Budget",
    "Candidate",
    "CandidateResult",
    "Constraint",
    "DataPart",
    "Executor",
    "FixedRounds",
    "Fold",
    "Hyperband",
    "InProcess",
    "LocalProcesses",
    "MaxBytes",
    "MaxFLOPs",
    "MaxLatency",
    "MaxParameters",
    "MemberFailedError",
    "RayCluster",
    "RegularizedEvolution",
    "SearchSpace",
    "SuccessiveHalving",
    "SweepResult",
    "train_members",
]
