"""A LightningModule in the place of another."""

from lightning_structopt.distillation.stand_in.module import StandIn

__all__ = ["StandIn"]
