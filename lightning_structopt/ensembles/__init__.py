"""Ensembles: several models that answer as one, in parallel, in series or mixed."""

from lightning_structopt.ensembles.calibration import TemperatureScaling, expected_calibration_error
from lightning_structopt.ensembles.callback import SnapshotEnsemble
from lightning_structopt.ensembles.diversity import disagreement, error_correlation
from lightning_structopt.ensembles.mixed import (
    GatingNetwork,
    Held,
    MixedEnsemble,
    OutOfFold,
    gather_out_of_fold,
    out_of_fold,
)
from lightning_structopt.ensembles.parallel import ParallelEnsemble
from lightning_structopt.ensembles.predictions import Predictions, predictions
from lightning_structopt.ensembles.selection import Selection, select_greedily
from lightning_structopt.ensembles.serial import CascadeReport, SerialEnsemble
from lightning_structopt.ensembles.soup import soup
from lightning_structopt.ensembles.weights import weights_by_metric

__all__ = [
    "CascadeReport",
    "GatingNetwork",
    "Held",
    "MixedEnsemble",
    "OutOfFold",
    "ParallelEnsemble",
    "Predictions",
    "Selection",
    "SerialEnsemble",
    "SnapshotEnsemble",
    "TemperatureScaling",
    "disagreement",
    "error_correlation",
    "expected_calibration_error",
    "gather_out_of_fold",
    "out_of_fold",
    "predictions",
    "select_greedily",
    "soup",
    "weights_by_metric",
]
