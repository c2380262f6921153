"""`ChannelPruning` and `NetworkGrowth` on a `DistillationModule` change the student, and load into its class."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import FEATURES, Classifier, loader, trainer

from lightning_structopt.distillation import DistillationModule
from lightning_structopt.growth import NetworkGrowth, Widen, load_grown
from lightning_structopt.shrinking import ChannelPruning, ChannelRatio, load_shrunk


def pruning(remove: Any) -> ChannelPruning:
    return ChannelPruning(
        ChannelRatio(0.5), end=0.5, remove=remove, example_input=torch.zeros(2, FEATURES), verbose=False
    )


@pytest.mark.parametrize("remove", ["end", "now"])
def test_the_student_shrinks_and_loads_into_its_class(tmp_path: Path, remove: str) -> None:
    student, callback = Classifier(hidden=16), pruning(remove)
    this = trainer(tmp_path, callback)
    this.fit(DistillationModule(Classifier(hidden=24, seed=2), student), loader())
    this.save_checkpoint(tmp_path / "small.ckpt")
    small = load_shrunk(Classifier, tmp_path / "small.ckpt", hidden=16)
    assert type(small) is Classifier
    assert small.net[0].out_features == 8
    result = callback.shrunk if remove == "end" else student
    assert type(result) is Classifier
    inputs = torch.randn(4, FEATURES)
    torch.testing.assert_close(small.eval()(inputs), result.eval()(inputs))


def test_the_student_grows_and_loads_into_its_class(tmp_path: Path) -> None:
    student = Classifier(hidden=8)
    growth = NetworkGrowth([1], widen=Widen(2.0), verbose=False)
    this = trainer(tmp_path, growth)
    this.fit(DistillationModule(Classifier(hidden=24, seed=2), student), loader())
    this.save_checkpoint(tmp_path / "large.ckpt")
    grown = load_grown(Classifier, tmp_path / "large.ckpt", hidden=8)
    assert grown.net[0].out_features == student.net[0].out_features == 16
