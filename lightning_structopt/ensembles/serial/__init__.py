"""Members that answer one after another."""

from lightning_structopt.ensembles.serial.calibrate import CascadeReport
from lightning_structopt.ensembles.serial.module import SerialEnsemble

__all__ = ["CascadeReport", "SerialEnsemble"]
