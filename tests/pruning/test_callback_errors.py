"""Bad input: one clear error before the first training step, and nothing lost."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from support import Classifier, assert_same_state, loader, sgd, trainer
from torch import nn

from lightning_structopt.pruning import CubicRamp, IterativePruning, Magnitude, Unstructured, prune


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"`sparsity` must be in \[0, 1\)\. Found `sparsity = 1.0`\."),
        ({"sparsity": 1.2}, ValueError, r"Found `sparsity = 1.2`"),
        ({"sparsity": -0.1}, ValueError, r"Found `sparsity = -0.1`"),
        ({"sparsity": math.nan}, ValueError, r"Found `sparsity = nan`"),
        ({"sparsity": "half"}, TypeError, r"`sparsity` must be a number. Found `sparsity = 'half'`"),
        ({"begin": 0.8, "end": 0.2}, ValueError, "`begin` must be less than `end`"),
        ({"end": 1.1}, ValueError, r"`end` must be in \[0, 1\]"),
        ({"every": 0}, ValueError, "`every` must be at least 1. Found `every = 0`"),
        (
            {"interval": "batch"},
            ValueError,
            "`interval` must be 'epoch' or 'step'. Found `interval = 'batch'`",
        ),
        (
            {"criterion": Magnitude},
            TypeError,
            r"`criterion` must be a `Criterion`.* Did you mean `Magnitude\(\)`",
        ),
        ({"pattern": "global"}, TypeError, "`pattern` must be a `Pattern`. Found `pattern = 'global'`"),
        ({"ramp": CubicRamp}, TypeError, r"`ramp` must be a `Ramp`.* Did you mean `CubicRamp\(\)`"),
        ({"include": 3}, TypeError, "`include` takes globs on parameter names and module types. Found 3"),
        (
            {"exclude": [nn.Linear(1, 1)]},
            TypeError,
            "`exclude` takes globs on parameter names and module types",
        ),
    ],
)
def test_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        IterativePruning(**arguments)


def test_arguments_of_prune() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"`sparsity` must be in \[0, 1\)"):
        prune(layer, 1.0)
    with pytest.raises(TypeError, match=r"Did you mean `Unstructured\(\)`"):
        prune(layer, 0.5, pattern=Unstructured)


class Untouched(Classifier):
    """Fails if a single training step is taken."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("training began")


def refuse(root: Path, message: str, *callbacks: Any, module: Any = None, **kwargs: Any) -> None:
    module = module or Untouched()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(root, *callbacks, **kwargs).fit(module, loader())
    assert_same_state(dict(module.state_dict()), before)


def test_training_without_an_end(tmp_path: Path) -> None:
    refuse(
        tmp_path,
        r"Found `max_epochs = -1` and no `max_steps`. Give one of them",
        IterativePruning(),
        max_epochs=-1,
    )


def test_a_window_in_which_nothing_happens(tmp_path: Path) -> None:
    message = r"over 1 epochs: no epoch starts in it. Give `interval=\"step\"`"
    refuse(tmp_path, message, IterativePruning(), max_epochs=1)


def test_an_unknown_length_in_steps(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(loader().dataset)

    data = torch.utils.data.DataLoader(Stream(), batch_size=8)
    with pytest.raises(
        ValueError, match=r"Found a loader without a length. Give `interval=\"epoch\"`, `max_steps`"
    ):
        trainer(tmp_path, IterativePruning(interval="step")).fit(Untouched(), data)
    with pytest.raises(ValueError, match=r"Give `interval=\"step\"`"):
        trainer(tmp_path, IterativePruning(interval="epoch"), max_epochs=-1, max_steps=9).fit(
            Untouched(), data
        )


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    message = r"No parameter matches `include = 'backbone.\*'`. Parameters start with: 'net'"
    refuse(tmp_path, message, IterativePruning(include="backbone.*"))


def test_a_module_without_weights(tmp_path: Path) -> None:
    module = Untouched()
    module.net = nn.BatchNorm1d(12)
    refuse(
        tmp_path, "at least one weight to prune. Found none in `Untouched`", IterativePruning(), module=module
    )


def test_two_owners_of_one_parameter(tmp_path: Path) -> None:
    message = r"belong to one `IterativePruning`. Found two that own `net.3.weight`"
    refuse(tmp_path, message, IterativePruning(), IterativePruning(include="net.3.weight"))


def test_lbfgs(tmp_path: Path) -> None:
    refuse(tmp_path, "Found `LBFGS`", IterativePruning(), module=Untouched(torch.optim.LBFGS))


def test_a_sparse_parameter(tmp_path: Path) -> None:
    module = Untouched(lambda parameters: sgd(list(parameters)[2:]))
    module.net[0].weight = nn.Parameter(module.net[0].weight.detach().to_sparse(), requires_grad=False)
    with pytest.raises(TypeError, match=r"Found that `net.0.weight` is .* torch.sparse_coo. Give `exclude"):
        trainer(tmp_path, IterativePruning()).fit(module, loader())


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_that_flatten_parameters(tmp_path: Path, name: str) -> None:
    """Neither runs on a CPU, so the class is made by name."""
    strategy = type(name, (SingleDeviceStrategy,), {})()
    refuse(tmp_path, rf"Found `{name}`, which trains flattened copies", IterativePruning(), strategy=strategy)


def test_a_diverged_run_says_so(tmp_path: Path) -> None:
    class Diverging(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * math.nan

    with pytest.raises(ValueError, match="NaN"):
        trainer(tmp_path, IterativePruning()).fit(Diverging(), loader())


def test_pytorch_lightning_is_named(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("training began")

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    run = other.Trainer(accelerator="cpu", max_epochs=2, logger=False, callbacks=[IterativePruning()])
    with pytest.raises(
        TypeError, match=r"built on the package `lightning`. Found a `Trainer` of the package `pytorch"
    ):
        run.fit(Module(), loader())
    with pytest.raises(TypeError, match="pytorch_lightning"):
        trainer(tmp_path, IterativePruning()).fit(Module(), loader())
