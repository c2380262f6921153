"""Ensembles from a YAML file, by LightningCLI."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from nets import fit
from support import Classifier, loader

from lightning_structopt.ensembles import MixedEnsemble, ParallelEnsemble, SerialEnsemble, SnapshotEnsemble

pytestmark = pytest.mark.filterwarnings("ignore")  # jsonargparse and pydantic deprecate each other's parts


class Configured(Classifier):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__(hidden=hidden)
        self.save_hyperparameters()


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()


MEMBERS = """
  members:
    - class_path: test_ensembles_cli.Configured
    - class_path: test_ensembles_cli.Configured
      init_args: {hidden: 8}
    - [test_ensembles_cli.Configured, CHECKPOINT]
"""
CONFIGURATIONS: dict[str, tuple[Any, str, str]] = {
    "learned": (ParallelEnsemble, "fit", "  weights: learned\n  combine: logits\n  stack: false\n  lr: 0.1"),
    "weighed": (ParallelEnsemble, "validate", "  weights: [0.5, 0.25, 0.25]"),
    "together": (
        ParallelEnsemble,
        "fit",
        "  train_members: true\n  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}",
    ),
    "cascade": (SerialEnsemble, "validate", "  mode: cascade\n  threshold: [0.5, 0.75]"),
    "chain": (SerialEnsemble, "fit", "  mode: chain\n  shrinkage: 0.5"),
    "stacking": (
        MixedEnsemble,
        "fit",
        "  combiner: {class_path: torch.nn.Linear, init_args: {in_features: 12, out_features: 4}}",
    ),
    "gate": (
        MixedEnsemble,
        "fit",
        """
  combiner:
    class_path: lightning_structopt.ensembles.GatingNetwork
    init_args:
      network: {class_path: torch.nn.Linear, init_args: {in_features: 12, out_features: 3}}
""",
    ),
}


@pytest.mark.parametrize(("kind", "command", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_works_from_a_configuration(kind: Any, command: str, options: str, tmp_path: Path) -> None:
    fit(tmp_path, Configured(hidden=24), ModelCheckpoint(tmp_path, filename="member"), max_epochs=1)
    members = MEMBERS.replace("CHECKPOINT", str(tmp_path / "member.ckpt"))
    (tmp_path / "config.yaml").write_text(
        f"""
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
model:{members}{options}
"""
    )
    arguments = [command, "--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(kind, Data, save_config_callback=None, args=arguments)
    assert type(cli.model) is kind
    assert [member.net[0].out_features for member in cli.model.members] == [16, 8, 24]
    assert "val_loss" in cli.trainer.callback_metrics


def test_snapshots_from_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_structopt.ensembles.SnapshotEnsemble
      init_args: {cycles: 2, minimum: 0.1}
"""
    )
    arguments = ["fit", "--config", str(tmp_path / "config.yaml")]
    cli = LightningCLI(Configured, Data, save_config_callback=None, args=arguments)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, SnapshotEnsemble))
    assert len(callback.snapshots) == 2
